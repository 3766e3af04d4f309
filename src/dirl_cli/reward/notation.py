"""How an answer is written: exact numbers, lists, brackets. It works on tidy text alone."""

import re
from fractions import Fraction

DECIMALS = 6  # to which a decimal must agree with a number that no decimal equals, as in math-verify; places or digits

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d{1,60})?|\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
FRACTION = rf"\\frac ?(?:\{{ ?([-+]? ?{DECIMAL}) ?\}}|(\d)) ?(?:\{{ ?({DECIMAL}) ?\}}|(\d))"
MIXED = rf"([-+]?) *(?:(\d{{1,60}}) +)?([-+]? ?{DECIMAL})(?: ?/ ?({DECIMAL}))?"
NUMBER = re.compile(rf"{MIXED} ?(?:(?:\\times|\\cdot) ?10 ?\^ ?\{{?([-+]?\d{{1,2}})\}}?)?")
REPEATING = re.compile(r"(-?) ?(\d{0,60})\.(\d{0,60})\\(?:overline|bar|dot) ?\{? ?(\d{1,60}) ?\}?")

LIST = r"[,;]|\\cup(?![a-zA-Z])"
EQUALS = r"(?<![<>!])=|\\(?:in|equiv)(?![a-zA-Z])"
RATIO = ":"
RELATION = r"\\[lg]e(?![a-zA-Z])|<|>"
SPACE = re.compile(r"(?<!\d) | (?!\d)")  # but 5 4 is not 54
BRACKET = re.compile(r"(\\begin|\\?[({\[])|\\end|\\?[)}\]]")
BRACKETED = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", re.DOTALL)
COLUMN = re.compile(r"\\begin\{[pb]matrix\}([^&]*?)(?:\\\\ ?)?\\end\{[pb]matrix\}")


def number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, a fraction or a mixed number, also times a power of ten."""
    if repeating := REPEATING.fullmatch(text):
        return repeated(*repeating.groups())
    # A fraction becomes a/b, so that one pattern reads it alone and behind a whole number, as in 2 3/4.
    match = NUMBER.fullmatch(re.sub(FRACTION, r" \1\2/\3\4 ", text).strip())
    if match is None or (match[2] and not match[4]):
        return None
    top = decimal_value(match[3])
    bottom = decimal_value(match[4] or "1")
    if not bottom:
        return None
    value = (int(match[2] or 0) + top / bottom) * Fraction(10) ** int(match[5] or 0)
    if match[1] == "-":
        return -value
    return value


def decimal_value(decimal: str) -> Fraction:
    """The exact value of digits as they are written, with commas and spaces between them."""
    return Fraction(decimal.replace(",", "").replace(" ", ""))


def repeated(sign: str, integer: str, once: str, period: str) -> Fraction:
    """A decimal with a period, as 0.1666…: 0, 1 and 6."""
    ninths = Fraction(int(period), 10 ** len(period) - 1)
    value = int(integer or 0) + (int(once or 0) + ninths) / 10 ** len(once)
    return -value if sign else value


def fraction(value: Fraction) -> str:
    """The number as it is written."""
    sign = "-" if value < 0 else ""
    size = abs(value)
    if size.denominator == 1:
        return f"{sign}{size}"
    return rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"


def has_decimals(value: Fraction) -> bool:
    """Whether some decimal equals the number."""
    return (value * 10**99).denominator == 1


def round_alike(exact: Fraction, other: Fraction) -> bool:
    """Whether two numbers agree to six places, or to six digits where they are small."""
    places = DECIMALS
    while exact and abs(exact) * 10**places < 10 ** (DECIMALS - 1) and places < 10 * DECIMALS:
        places += 1
    return round(exact, places) == round(other, places)


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no bracket."""
    parts = []
    depth = start = 0
    for token in re.finditer(f"{BRACKET.pattern}|(?P<separator>{separator})", text):
        if not token["separator"]:
            depth += 1 if token[1] else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def bracketed(text: str, opening: str = "([") -> tuple[str, str, str] | None:
    """The opening bracket, what it holds and the closing one, where one such pair holds the whole text."""
    if column := COLUMN.fullmatch(text):  # a vector, written upright
        coordinates = column[1].replace(r"\\", ",")
        text = f"({coordinates})"
    match = BRACKETED.fullmatch(text)
    if match is None or match[1] not in opening:
        return None

    # The first bracket is closed by the last, and not before, as it is in (1, 2), (3, 4).
    depth = 1
    for token in BRACKET.finditer(match[2]):
        depth += 1 if token[1] else -1
        if not depth:
            return None
    return match[1], match[2], match[3]
