r"""Finding the final answer in a text: what stands in the last `\boxed{}`, or in several that are one answer."""

import re
from typing import NamedTuple

# A line break (\\) is one token, so that the brace after it counts; \{ and \} are characters, not groups.
TOKENS = re.compile(r"\\\\(?!boxed)|\\boxed\s*\{|\\[{}]|[{}]")

# Boxes are one answer if nothing is said between them, as in $\boxed{1}$ and $x = -\boxed{2}$.
MATHS = r"\s|\$|\\[()\[\],;:! ]|\\q?quad(?![a-zA-Z])|[~*]"
SEPARATOR = r"[,;&]|\\(?:text|mbox) ?\{ ?,? ?(?:and|or)? ?\}|(?:and|or)(?![a-zA-Z])"
BETWEEN = re.compile(rf"(?:{MATHS}|{SEPARATOR})*")
NEAR = 80  # characters between two such boxes, at most
NAME = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z](?:_(?:\w|\{\w{1,9}\}))?\s*=\s*)-?\s*$")
MINUS = re.compile(r"(?:(?:=|(?<!\\)\$|\\[(\[])\s*[-−]\s*|[,;]\s*[-−])$")  # in a formula; in prose a dash is none

SOLUTION = re.compile(r"####[ \t]*([^\n#]+)\s*$")  # how GSM8K ends its solutions


class Box(NamedTuple):
    """A closed box: where its command, its content and what follows it begin."""

    start: int
    content: int
    end: int


def last_boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{…}` holds, or None; braces balance, and the time is linear in the text."""
    boxes = closed_boxes(text)
    if not boxes:
        return None
    return held(text, boxes[-1])


def final_answer(text: str) -> str | None:
    r"""As `last_boxed`, with the sign before the box; several boxes that are one answer are a list."""
    boxes = closed_boxes(text)
    if not boxes:
        return None

    # From the last box backwards, as far as nothing is said in between.
    answer = [boxes.pop()]
    while boxes and are_one_answer(text, boxes[-1], answer[-1]):
        answer.append(boxes.pop())

    parts = []
    for box in reversed(answer):
        before = text[max(0, box.start - NEAR) : box.start]
        part = held(text, box)
        if MINUS.search(before):
            part = f"-{part}"
        # Only where there are several values does it matter which is x and which is y.
        if len(answer) > 1 and (name := NAME.search(before)):
            part = name[1] + part
        parts.append(part)
    return ", ".join(parts)


def are_one_answer(text: str, first: Box, second: Box) -> bool:
    """Whether nothing is said between two boxes but separators and what the second is called."""
    if not 0 <= second.start - first.end <= NEAR:
        return False
    between = text[first.end : second.start]
    return BETWEEN.fullmatch(MINUS.sub("", NAME.sub("", between))) is not None


def reference(gold: str) -> str:
    r"""The final answer of a reference, which may be a whole solution that ends in `#### 4` or holds a `\boxed{4}`."""
    if solution := SOLUTION.search(gold):
        gold = solution[1]
    answer = gold.strip()
    return final_answer(answer) or answer


def closed_boxes(text: str) -> list[Box]:
    """Every box that is closed, in the order in which they begin."""
    # Boxes close before those that they stand in: a stack of the groups that are open tells which one a brace closes.
    open_groups: list[tuple[int, int]] = []  # where a box and its content begin, -1 for any other group
    boxes = []
    for token in TOKENS.finditer(text):
        match token.group()[-1], token.group()[0]:
            case "{", "{":
                open_groups.append((-1, -1))
            case "{", _ if len(token.group()) > 2:
                open_groups.append((token.start(), token.end()))
            case "}", "}" if open_groups:
                start, content = open_groups.pop()
                if start >= 0:
                    boxes.append(Box(start, content, token.end()))
    return sorted(boxes)


def held(text: str, box: Box) -> str:
    r"""The content of a box, without space around it; of a space that is written `\ ` the backslash goes, too."""
    content = text[box.content : box.end - 1].strip()
    backslashes = len(content) - len(content.rstrip("\\"))
    if backslashes % 2:
        return content[:-1].rstrip()
    return content
