r"""How an answer is written: LaTeX that only formats, exact numbers, units, lists, brackets. It works on text alone."""

import re
from fractions import Fraction

SYMBOLS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "°": r"^\circ "}
)
REWRITES = [
    (r"(?<=\d)(?:\{,\}|,\\! *|\\[,;:! ] *| )(?=\d{3}(?!\d))", ""),  # thousands: 1{,}000, 10,\!080, 1\,000, 1 000
    (r"(?<!\\)\$|(?<!\\)\\[()\[\]]|\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])", ""),
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s)+", " "),
    (r"^(?: |\*\*|`)+|(?: |\*\*|`|\\\\|(?<!\\)[,;:]|(?<!\.)\.)+$", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:mathrm|mathbf|textbf|textit|textrm|mbox)(?![a-zA-Z])", r"\\text"),
    (r" ?(?:\^ ?\{? ?\\circ|\\degree)(?![a-zA-Z]) ?\}?", ""),
    (r" ?(?:\\?%|\\text ?\{ ?(?:\\?%|percent) ?\}|percent(?:age)?$)", r"\\%"),
    (r",? ?(?:\\text ?\{ ?(?:and|or) ?\}|(?<![\w\\])(?:and|or)(?!\w))", ","),
    (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
]

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d{1,60})?|\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
FRACTION = rf"\\frac ?(?:\{{ ?([-+]? ?{DECIMAL}) ?\}}|(\d)) ?(?:\{{ ?({DECIMAL}) ?\}}|(\d))"
MIXED = rf"([-+]?) *(?:(\d{{1,60}}) +)?([-+]? ?{DECIMAL})(?: ?/ ?({DECIMAL}))?"
NUMBER = re.compile(rf"{MIXED} ?(?:(?:\\times|\\cdot) ?10 ?\^ ?\{{?([-+]?\d{{1,2}})\}}?)?")

# Units that make an answer wrong when they are mixed up; any other word only says what is counted.
NAMES = "mm millimeter|cm centimeter|meter m|km kilometer|inch in|foot feet ft|yard yd|mile|gram g|kg kilogram|pound lb"
NAMES += "|second sec s|minute min|hour hr h|day|week|month|year yr|cent|dollar|degree deg|radian rad|am|pm"
UNITS = {name: names.split()[0] for names in NAMES.split("|") for name in names.split()}
MEASURE = rf"\b({'|'.join(UNITS)})(?:s|es)?\b"
BARE = rf" ?(?:{'|'.join(name for name in UNITS if len(name) > 1)}|sq|(?<= )[A-Za-z]{{4,}})(?:s|es)?(?![A-Za-z])"
UNIT = re.compile(
    rf"(.*?[^ ^_,;=+*/(<>-])(?: ?\\text ?\{{([^{{}}]*)\}}|(?<=[\d}}])({BARE}[A-Za-z/. ]*))(?:\^\{{?\d\}}?)?", re.DOTALL
)
MONEY = re.compile(r"(-?) ?(?:\\\$|€|£) ?(.+)", re.DOTALL)

LIST, EQUALS, RATIO = r"[,;]|\\cup(?![a-zA-Z])", r"(?<![<>!])=|\\in(?![a-zA-Z])", ":"
BRACKET = re.compile(r"(\\begin|\\?[({\[])|\\end|\\?[)}\]]")
BRACKETED = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", re.DOTALL)
COLUMN = re.compile(r"\\begin\{[pb]matrix\}([^&]*?)(?:\\\\ ?)?\\end\{[pb]matrix\}")


def tidy(answer: str) -> str:
    """The answer without what carries no meaning: dollar signs, spacing, sizes, fonts, final punctuation, degrees."""
    answer = answer.translate(SYMBOLS)
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer)
    return answer


def number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a fraction or a mixed number, also times a power of ten."""
    found = NUMBER.fullmatch(re.sub(FRACTION, r" \1\2/\3\4 ", text).strip())
    if found is None or (found[2] and not found[4]):
        return None
    top, bottom = (Fraction((part or "1").replace(",", "").replace(" ", "")) for part in found.group(3, 4))
    value = (int(found[2] or 0) + top / bottom) * Fraction(10) ** int(found[5] or 0) if bottom else None
    return -value if value and found[1] == "-" else value


def without_unit(text: str) -> tuple[str, list[str]]:
    """The text before its unit, and those of `UNITS` that this names."""
    money = MONEY.fullmatch(text)
    text = money[1] + money[2] if money else text
    found = UNIT.fullmatch(text)
    unit = (found[2] or found[3]).lower().replace(".", "") if found else ""
    units = [UNITS[name] for name in re.findall(MEASURE, unit)]
    return found[1] if found else text, ["dollar", *units] if money else units


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(f"{BRACKET.pattern}|(?P<separator>{separator})", text):
        if not token["separator"]:
            depth += 1 if token[1] else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def bracketed(text: str, opening: str = "([") -> tuple[str, str, str] | None:
    """The opening bracket, what it holds and the closing one, where one such pair holds the whole text."""
    column = COLUMN.fullmatch(text)
    found = BRACKETED.fullmatch("(" + column[1].replace(r"\\", ",") + ")" if column else text)
    if found is None or found[1] not in opening:
        return None
    depth = 1
    for token in BRACKET.finditer(found[2]):
        depth += 1 if token[1] else -1
        if not depth:
            return None
    return found[1], found[2], found[3]
