r"""Finding the final answer in a text: what stands in the last `\boxed{}`."""

import re

# A line break (\\) is one token, so that the brace after it counts; \{ and \} are characters, not groups.
TOKENS = re.compile(r"\\\\(?!boxed)|\\boxed\s*\{|\\[{}]|[{}]")


def last_boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{…}` holds, or None; braces balance, and the time is linear in the text."""
    open_groups: list[int] = []  # where the content of a box begins, -1 for any other group
    last = None
    for token in TOKENS.finditer(text):
        match token.group()[-1], token.group()[0]:
            case "{", "{":
                open_groups.append(-1)
            case "{", _ if len(token.group()) > 2:
                open_groups.append(token.end())
            case "}", "}" if open_groups:
                start = open_groups.pop()
                if start >= 0 and (last is None or start > last[0]):
                    last = start, token.start()
    return None if last is None else text[last[0] : last[1]].strip()
