"""What a tidy answer holds: elements of lists, cases, solutions by name, terms of inequalities, conditions."""

import re
from itertools import pairwise

from dirl_cli.reward.names import full, is_name, without_name
from dirl_cli.reward.notation import EQUALS, LIST, RELATION, SPACE, bracketed, number, split

MODULUS = re.compile(r"\| ?([a-zA-Z]) ?\|")
FOR = re.compile(r",? ?(?:\\text ?\{ ?,? ?(?:where|with|for)( all| any| every| each)?[^{}]*\}|(\\forall(?![a-z]))) ?")
IN = r"\\in ?\\mathbb ?\{?[A-Z]\}?[\^_+*{}\d> ]*|(?:\\ge|>|\\ne) ?-?[0-3]"
CONDITION = re.compile(rf"(?:\\forall )?([a-zA-Z]) ?(?:{IN})?|\\forall ([a-z])")
IF = re.compile(r"^\\text ?\{ ?(?:if|for|when|where) ?\} ?|[,;. ]+$")


def conditioned(text: str) -> tuple[str, list[str]]:
    r"""A formula and what stands after it of its letters alone, as c \in \mathbb{R} and n \ge 1."""
    text = FOR.sub(lambda match: ", \\forall " if match[1] or match[2] else ", ", text)
    text = re.sub(r" ?\(([a-zA-Z] ?(?:\\in|\\ge|\\ne|>)[^()]*)\)$", r", \1", text)

    # What stands behind commas is a condition if all of it is, and of letters in the formula; else part of a list.
    formula, *conditions = split(text, ",")
    if re.search(rf"{RELATION}|\\(?:in|ne)(?![a-zA-Z])", formula):
        return text, []  # it is a condition itself
    if not conditions:
        return text, []
    for condition in conditions:
        match = CONDITION.fullmatch(condition)
        if match is None or match[0] == match[1]:
            return text, []
        if not re.search(rf"(?<!\\){match[1] or match[2]}", formula):
            return text, []  # it is of a letter that the formula has not
    return formula, [SPACE.sub("", condition) for condition in conditions]


def cases(rows: str) -> list[list[str]]:
    """The cells of each row, without commas and ifs."""
    cells_by_row = []
    for row in rows.split(r"\\"):
        if row.strip():
            cells = [cell.strip() for cell in row.split("&")]
            cells_by_row.append([IF.sub("", IF.sub("", cell)) for cell in cells])  # an if before, a comma behind
    return cells_by_row


def solutions(text: str) -> list[dict[str, str]] | None:
    """The values of each solution by name, as in x=1, y=2 and (x,y)=(1,2),(3,4); None if there are not two names."""
    solved: list[dict[str, str]] = [{}]
    names: list[str] = []
    for part in split(text, LIST):
        *left, right = split(part, EQUALS)
        if left and (tuple_of_names := bracketed(left[0], "(")):
            names = [full(name) for name in split(tuple_of_names[1], LIST)]
        elif left and is_name(left[0]):
            # A name that comes again begins the next solution.
            name = full(left[0])
            if name in solved[-1]:
                solved.append({})
            solved[-1][name] = right
            continue

        # Tuples of values in the order of the names, one by one or in a set.
        rows = [right]
        if braces := bracketed(right, r"\{"):
            rows = split(braces[1], LIST)
        for row in rows:
            brackets = bracketed(row, "(")
            if not names or not brackets:
                return None
            values = split(brackets[1], LIST)
            if len(values) != len(names):
                return None
            solved.append(dict(zip(names, values, strict=True)))

    solved = [solution for solution in solved if solution]
    if any(len(solution) == 1 for solution in solved):
        return None
    return solved


def ordered(solution: dict[str, str]) -> list[str]:
    """Its values, by the alphabet where the names follow one another there, as x and y; otherwise as written."""
    names = sorted(solution)
    are_neighbours = all(len(a) == len(b) == 1 and ord(b) == ord(a) + 1 for a, b in pairwise(names))
    if not are_neighbours:
        return list(solution.values())
    return [solution[name] for name in names]


def tuples(solved: list[dict[str, str]]) -> str:
    """Solutions as tuples of their values."""
    texts = []
    for solution in solved:
        values = ", ".join(ordered(solution))
        texts.append(f"({values})")
    return ", ".join(texts)


def kind_and_elements(text: str) -> tuple[str, list[str]]:
    """The pair of brackets that holds all of a text, nothing without one, and what is listed in it."""
    brackets = bracketed(text)
    if brackets is None:
        return "", split(text, LIST)
    opening, content, closing = brackets
    return opening + closing, split(content, LIST)


def elements(text: str) -> list[str]:
    r"""What a list, a set or a union of intervals holds, ± as two; a text that is none of these holds itself."""
    listed = [text]
    if number(text) is None:  # 1,000 is one
        listed = split(text, LIST)
    *names, value = split(text, EQUALS)
    if len(listed) == 1 and all(map(is_name, names)) and (braces := bracketed(value, r"\{")):
        return elements(braces[1])

    # The signs of one element go together: 1 \pm a \mp b are 1 + a - b and 1 - a + b.
    signed = []
    for element in listed:
        upper = element.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = element.replace(r"\pm", "-").replace(r"\mp", "+")
        signed.append(upper)
        if lower != upper:
            signed.append(lower)
    return signed


def holds_sets(text: str) -> bool:
    """Whether it is a set of which an element is a set."""
    if text.count(r"\{") < 2:
        return False
    braces = bracketed(without_name(text), r"\{")
    if braces is None:
        return False
    return any(bracketed(element, r"\{") for element in split(braces[1], LIST))


def ascending(text: str) -> tuple[list[str], list[str]]:
    """The terms and the signs of a chain of inequalities, the least first."""
    terms = split(text, RELATION)
    signs = re.findall(RELATION, text)
    if len(terms) != len(signs) + 1:
        return [text], []
    if all(sign in (">", r"\ge") for sign in signs):
        turned = [sign.replace(">", "<").replace("ge", "le") for sign in reversed(signs)]
        return terms[::-1], turned
    return terms, signs


def without_modulus(text: str) -> str:
    """The same inequality of a letter's modulus and a positive number, of the letter alone."""
    (small, *rest), signs = ascending(text)
    if len(rest) != 1 or len(signs) != 1:
        return text
    large = rest[0]
    sign = signs[0]
    if bounded := MODULUS.fullmatch(small):
        if not is_positive(large):
            return text
        return f"-{large} {sign} {bounded[1]} {sign} {large}"
    if beyond := MODULUS.fullmatch(large):
        if not is_positive(small):
            return text
        return f"{beyond[1]} {sign} -{small}, {small} {sign} {beyond[1]}"
    return text


def is_positive(text: str) -> bool:
    value = number(text)
    return value is not None and value > 0
