r"""Words beside a number: which only say what is counted, which are units, which make another number of it.

Nouns and adjectives are without end, so almost any word may stand after a number and say what is counted. The words
that multiply, divide or qualify are few: they are the tables below, and none of them is ever dropped.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from dirl_cli.reward.notation import fraction, number

# Units make an answer wrong when they are mixed up; the first name of each is the one compared.
UNIT_NAMES = """
    mm millimeter millimetre, cm centimeter centimetre, dm decimeter, meter metre m, km kilometer
    inch in, foot feet ft, yard yd, mile mi, mg milligram, gram g gm, kg kilogram kilo, tonne
    ounce oz, pound lb gbp £, ml milliliter millilitre, cl centiliter, liter litre l, gallon gal
    ms millisecond, second sec s, minute min, hour hr h, day, week, month, year yr, am, pm
    cent ¢, dollar usd $, euro eur €, yen jpy, yuan cny rmb, rupee inr rs ₹
    degree deg, radian rad, celsius, fahrenheit, kelvin k, mph, kph kmh kmph
    newton n, joule j, watt w, volt v, kw kilowatt, kj kilojoule, hz hertz, pascal pa
"""


def units_by_name() -> dict[str, str]:
    """The first name of a unit by each of its names, in the singular and, of longer ones, the plural."""
    units = {}
    for line in UNIT_NAMES.strip().splitlines():
        for unit_names in line.split(","):
            unit, *synonyms = unit_names.split()
            for name in (unit, *synonyms):
                units[name] = unit
    for name, unit in list(units.items()):
        if len(name) > 1:  # ms are milliseconds, not metres
            units[f"{name}s"] = unit
            units[f"{name}es"] = unit
    return units


UNITS = units_by_name()
SPELT = {"mph": ["mile", "hour"], "kph": ["km", "hour"]}
ONE_LETTER = "mgslLhNJWVK"  # the units among upright letters; any other is a variable
SIZES = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}

PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
PARTS |= {"ninth": 9, "tenth": 10, "twelfth": 12, "sixteenth": 16, "twentieth": 20}
POWERS = {"ten": 1, "hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}
POWERS |= {"mil": 6, "mn": 6, "bn": 9, "grand": 3, "myriad": 4}
MULTIPLIERS = {name: Fraction(1, parts) for name, parts in PARTS.items()}
MULTIPLIERS |= {name: Fraction(10**power) for name, power in POWERS.items()}
MULTIPLIERS |= {f"{name}th": Fraction(1, 10**power) for name, power in POWERS.items() if power > 1}
MULTIPLIERS |= {"dozen": Fraction(12), "score": Fraction(20), "gross": Fraction(144)}
MULTIPLIERS |= {f"{name}s": factor for name, factor in MULTIPLIERS.items()} | {"halves": Fraction(1, 2)}
MULTIPLIERS |= {"百": Fraction(100), "千": Fraction(1000), "万": Fraction(10**4), "亿": Fraction(10**8)}

CARDINALS = "zero one two three four five six seven eight nine ten eleven twelve"
COUNTS = {word: count for count, word in enumerate(CARDINALS.split())} | {"a": 1, "an": 1}
QUALIFIERS = f"""
    {CARDINALS} twenty thirty forty fifty sixty seventy eighty ninety googol
    and or least most max maximum minimum up upwards upward over under below beneath beyond exceeding
    plus minus divided multiplied power powers exponent factorial inverse reciprocal negative negated opposite
    doubled tripled quadrupled halved twice thrice double triple mod modulo remainder base conjugate
    repeating recurring repeated periodic infinity infinite permille basis bp bps ppm ppb pi radical
    about around roughly nearly almost approx approximately ish give circa maybe perhaps possibly probably unknown
    not no never neither nor cannot isn aren doesn wrong incorrect false
    impossible invalid rejected fails failed if unless except excluding without when where provided
    半 分 又 或 和 不 约 余 多 少 以 至 负 点 方 之
"""
QUALIFYING = {*MULTIPLIERS, *QUALIFIERS.split()}
NUMERAL = re.compile("(?:eleven|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie|[a-z]+illion)(?:th)?s?")
ONLY_FIRST = {"squared", "cubed", "root", "rooted", "sqrt"}  # after a unit they belong to it, as in metres squared
BESIDE = {"men", "sq", "cu", "or", "and", "at", "am", "pm", "ten"}  # short words that are no products of letters

SURELY = "exactly|precisely|only|just|a total of"
SURE = re.compile(rf"(?:\\text ?\{{ ?(?:{SURELY}) ?\}}|(?:{SURELY}) ) ?(?=-? ?(?:[\d.(]|\\frac|\\sqrt))", re.IGNORECASE)

CURRENCY = r"(?:US|A|C)? ?\\?\$|US dollars|USD|EUR|GBP|JPY|CNY|RMB|INR|Rs\.?|[€£¥₹]"
BEFORE = re.compile(rf"(-?) ?(?:\\text ?\{{ ?({CURRENCY}) ?\}}|({CURRENCY})) ?(-? ?[\d.(\\{{].*)", re.DOTALL)
AFTER = re.compile(r"(.*\d) ?(\\\$|[€£¥₹¢])", re.DOTALL)

ALPHABET = "abcdefghijklmnopqrstuvwxyz"  # no word is a part of it, as a product of variables may be

POWER = r"(?: ?\^ ?\{? ?-?\d ?\}?)?"
UPRIGHT = rf"\\text ?\{{[^{{}}]*\}}{POWER}"
TAIL = re.compile(
    rf"(?<=[^ ^_,;=+*/(<>-])(?: ?{UPRIGHT}(?:(?: ?(?:/|\\cdot(?![a-z])) ?| ?)(?:{UPRIGHT}|(?<=[/ ])[A-Za-z]+{POWER}))*"
    rf"|(?<=[\d}}!]) ?(?:[A-Za-z][A-Za-z/.' -]*{POWER}|[\u4e00-\u9fff]+))$"
)
COMMAND = re.compile(rf"\\text|\\cdot|{POWER[:-1]}|(?<=m)[23](?![a-z])")
EXPONENT = re.compile(r"(?:\^ ?\{? ?|(?<=m)(?=[23]))(-?\d)")  # of a unit: 2 in m^2 and m2
RATE = re.compile(rf" ?[a-zA-Z] ?/ ?[a-zA-Z]{{1,3}}{POWER}")  # m/s
WORD = re.compile(r"[A-Za-zÀ-ɏ]+|[\u4e00-\u9fff]")
SOME_WORD = re.compile(r"[A-Za-z$€£¥₹¢\u4e00-\u9fff]")


class Measured(NamedTuple):
    """A value as text, the units it is given in, their powers, and the words that qualify it."""

    text: str
    units: tuple[str, ...] = ()
    powers: tuple[str, ...] = ()
    qualified: str = ""

    def differs(self, other: "Measured") -> bool:
        """Whether the words alone make it another value."""
        if self.units and other.units:
            mixed = (self.units, self.powers) != (other.units, other.powers)
        else:
            mixed = bool(self.powers and other.powers and self.powers != other.powers)
        return mixed or self.qualified != other.qualified


def measured(text: str) -> Measured:
    """The value that a text gives, freed of the words beside it, which have multiplied it where they do."""
    if not SOME_WORD.search(text):
        return Measured(text)
    if sure := SURE.match(text):  # what is said to be exactly so is so
        text = text[sure.end() :]
    text, currency = without_currency(text)
    tail = TAIL.search(text)
    if tail is None or not is_wordy(tail[0]):
        return Measured(text, currency)

    value = text[: tail.start()].rstrip()
    words = WORD.findall(COMMAND.sub("", tail[0]).lower().replace(".", ""))
    value, words = multiplied(value, words)
    if any(map(qualifies, words)) or (words and words[0] in ONLY_FIRST):
        return Measured(value, currency, qualified=" ".join(words))

    # All other words only say what is counted; of them the units and their powers have to agree.
    named = [UNITS[word] for word in words if word in UNITS]
    if len(named) > 1:  # degrees celsius are celsius
        named = [unit for unit in named if unit != "degree"]
    units = list(currency)
    for unit in named:
        units += SPELT.get(unit, [unit])
    powers = [SIZES[word] for word in words if word in SIZES] + EXPONENT.findall(tail[0])
    return Measured(value, tuple(units), tuple(powers))


def qualifies(word: str) -> bool:
    """Whether a word makes another statement of the number before it, and does not only say what is counted."""
    return word in QUALIFYING or NUMERAL.fullmatch(word) is not None


def without_currency(text: str) -> tuple[str, tuple[str, ...]]:
    """The amount, and the currency that its sign or name tells."""
    if before := BEFORE.fullmatch(text):
        name = before[2] or before[3]
        amount = before[1] + before[4]
    elif after := AFTER.fullmatch(text):
        name = after[2]
        amount = after[1]
    else:
        return text, ()
    if name == "¥":  # a yen or a yuan
        return amount, ()
    unit = UNITS.get(name.lower().strip("\\. "), "dollar")
    return amount, (unit,)


def is_wordy(tail: str) -> bool:
    """Whether what stands after a value are words: no number, formula, variable or product of variables."""
    plain = COMMAND.sub("", tail)
    first = WORD.search(plain)
    if first is None or re.search(r"[\d=<>+*\\]", plain):
        return False
    # What is set upright is text; a letter alone in it may still be a variable's name.
    word = first[0]
    if not word.isascii():
        return True
    if r"\text" in tail:
        return len(word) > 1 or word in ONE_LETTER
    if len(word) == 1:
        return word in ONE_LETTER and (RATE.fullmatch(tail) is not None or tail == " L")

    # In italics, letters may be a product of variables, as in 2 ab: only what can hardly be one is a word.
    spaced = tail.startswith(" ")
    if word.lower() in UNITS or (spaced and word.lower() in BESIDE):
        return True
    if word in ALPHABET:
        return False
    if spaced:
        return any(len(other) > 3 for other in WORD.findall(plain))
    return len(word) > 3 and re.search(r".[aeiou]", word) is not None


def multiplied(value: str, words: list[str]) -> tuple[str, list[str]]:
    """The value times or plus what the first words say, as in 5 million and 12 and a half, and the other words."""
    factor = Fraction(1)
    more = Fraction(0)
    while words and words[0] in MULTIPLIERS:
        factor *= MULTIPLIERS[words[0]]
        words = words[1:]
    if len(words) > 2 and words[0] == "and" and words[2].removesuffix("s") in PARTS:
        count = COUNTS.get(words[1], 0)
        if count:
            more = count * MULTIPLIERS[words[2]]
            words = words[3:]
    if factor == 1 and more == 0:
        return value, words

    # A formula, as in \sqrt{2} million, is left to algebra with its factor.
    amount = number(value)
    if amount is None:
        return rf"({value}) \cdot {fraction(factor)} + {fraction(more)}", words
    return fraction(amount * factor + more), words
