r"""One way to write what may be written in many: without what only formats, with one command for one meaning."""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau phi chi psi omega"

# What is not ASCII, as LaTeX; full-width signs and letters in fonts become plain ones by Unicode's own tables.
SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "‐": "-",
        "‑": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "∙": r"\cdot ",
        "∗": "*",
        "÷": "/",
        "∕": "/",
    }
    | {"±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx "}
    | {"⩽": r"\le ", "⩾": r"\ge ", "≡": r"\equiv ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "}
    | {"∠": r"\angle ", "△": r"\triangle ", "∨": r"\lor ", "∧": r"\land ", "⟨": "(", "⟩": ")", "∣": "|", "′": "'"}
    | {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "→": r"\to "}
    | {"。": ".", "、": ",", "或": " or ", "和": " and ", "“": '"', "”": '"', "’": "'", "\u2044": "/", "°": r"^\circ "}
    | dict(zip("αβγδεζηθικλμνξπρστφχψω", (rf"\{name} " for name in GREEK.split()), strict=True))
    | {"Γ": r"\Gamma ", "Δ": r"\Delta ", "Π": r"\Pi ", "Σ": r"\Sigma ", "Φ": r"\Phi ", "Ω": r"\Omega "}
    | {"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"}
)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|log|lg|ln|exp"
TYPED = f"{FUNCTIONS}|sqrt|pi|theta|alpha|beta|gamma|delta|lambda|sigma|omega|phi"  # as in pi/2 and sqrt(2)
TEMPERATURES = {"C": r"\text{ celsius}", "F": r"\text{ fahrenheit}"}
BASES = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"

SIZES = "left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|(?:no)?limits|mathstrut|strut|hfill"
SIZES += "|tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|sf|tt|cal|bfseries|rmfamily|itshape|boldmath"
MARKS = "checkmark|blacksquare|qed"
ASIDE = r"color|textcolor|tag|label|hspace\*?|vspace\*?|phantom|hphantom|vphantom"  # with what they hold
LETTERS = "mathbf|mathit|mathsf|mathtt|boldsymbol|bm|pmb|underline|uline"
UPRIGHT = "mathrm|textbf|textit|textrm|textsf|texttt|textup|textnormal|emph|mbox|hbox"
QUALIFYING = "more|less|fewer|greater|higher|lower|above|below|under|over|up|a|an|one|two|three|so"  # 5 or more
RAISE, END = r" ?(?:\^ ?\{? ?)?(?:\\text ?\{ ?)?", r"(?![a-zA-Z])(?: ?\}){0,2}"  # around the end of an ordinal


def command(names: str) -> str:
    """One of these commands, and not the beginning of another."""
    return rf"\\(?:{names})(?![a-zA-Z])"


def upright(inside: str) -> str:
    """This alone, set upright."""
    return rf"\\text ?\{{ ?{inside} ?\}}"


def with_backslash(match: re.Match[str]) -> str:
    """A function or letter that was typed without its backslash, such as sqrt and pi, with it."""
    return rf"\{match[1]} " if match[1] else match[0]


def base_index(match: re.Match[str]) -> str:
    """The index that tells a base: its number, whether it was given in digits or by name."""
    name = match[1] or match[2]
    return f"_{name if name.isdigit() else 2 + BASES.split('|').index(name)}"


REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # Rows of a matrix, with or without the space below them.
    (rf"\\\\\*?(?: ?\[ ?-?[\d.]+ ?[a-z]{{2}} ?\])?|{command('cr')}", r"\\\\"),
    (command("hline"), ""),
    # What only sets, spaces and ends.
    (r"(?<=\d)(?:\{,\}|,\\! *|\\[,;:! ] *| )(?=\d{3}(?!\d))", ""),  # thousands: 1{,}000, 10,\!080, 1\,000, 1 000
    (rf"(?<!\\)\$|(?<!\\)\\[()\[\]]|\\!|{command(f'{SIZES}|{MARKS}')}|\\(?:{ASIDE}) ?\{{[^{{}}]*\}}", ""),
    (rf"(?:(?<!\\)\\[,;: ]|{command('q?quad')}|~|\s)+", " "),
    (r"^(?: |\*\*|`)+|(?: |\*\*|`|\\\\|(?<!\\)[,;:]|(?<!\.)\.)+$", ""),
    # Fonts: words are text, letters are what they are.
    (rf"\\(?:{LETTERS}) ?\{{ ?([A-Za-z][A-Za-z ]*[A-Za-z]) ?\}}", r"\\text{\1}"),
    (rf"{command(LETTERS)} ?", ""),
    (command(UPRIGHT), r"\\text"),
    (upright(r"([ei,;:$%]|\\\$|\\%)"), r" \1"),
    (rf"\\operatorname\*? ?\{{ ?({FUNCTIONS}|max|min|sec|csc|lcm|gcd|det) ?\}}", r"\\\1 "),
    (upright(f"({TYPED})"), r"\\\1 "),
    (r"(\\text ?\{[^{}]*[A-Za-z]{2})[.,;:!]+ ?\}", r"\1}"),
    # Functions and symbols as they are typed.
    (rf"\\text ?\{{[^{{}}]*\}}|(?<![A-Za-z\\])({TYPED})(?![A-Za-z])", with_backslash),
    (r"(?<![A-Za-z\\])inf(?:ini)?ty(?![A-Za-z])", r"\\infty "),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
    (r"(?<![\w.\\^])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,2})(?![\w.])", r"\1 \\times 10^{\2}"),  # as JSON and Python write it
    # One command for one meaning.
    (command("lg"), r"\\log_{10}"),
    (command("[lr]?vert"), "|"),
    (command("c?dots|dots[cbo]"), r"\\ldots"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\[dt]binom", r"\\binom"),
    (f"{command('leq?|leqslant')}|<=", r"\\le "),
    (f"{command('geq?|geqslant')}|>=", r"\\ge "),
    (r"\\not ?=|!=", r"\\ne "),
    (r"\\not ?\\([a-z]+)", r"\\not\1"),
    (command("lt"), "<"),
    (command("gt"), ">"),
    (command("imath"), "i"),
    (command("bmod"), r"\\mod "),
    (rf"{command('colon')}|(?<=\d) to (?=\d)|(?<=\d) ?{upright('to')} ?(?=\d)", ":"),
    (command("lbrack"), "["),
    (command("rbrack"), "]"),
    (command("langle|lparen"), "("),
    (command("rangle|rparen"), ")"),
    (command("lbrace"), r"\\{"),
    (command("rbrace"), r"\\}"),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
    (r"\\sqrt ?(\[[^\[\]]*\])? ?([a-zA-Z]|\d(?!\d))", r"\\sqrt\1{\2}"),
    (r"\\sqrt ?(\[[^\[\]]*\])? ?\(([^()]*)\)", r"\\sqrt\1{\2}"),
    # Degrees, percent, ordinals.
    (r" ?\^ ?\{? ?\\circ ?\}? ?(?:\\text ?\{ ?)?([CF])(?![a-zA-Z]) ?\}?", lambda match: TEMPERATURES[match[1]]),
    (r" ?(?:\^ ?\{? ?\\circ|\\degree)(?![a-zA-Z]) ?\}?", ""),
    (rf" ?(?:\\?%|{upright('per ?cent')}|{upright('pct')}|per ?cent(?:age)?$|pct$)", r"\\%"),
    (rf"(?<=1){RAISE}st{END}|(?<=2){RAISE}nd{END}|(?<=3){RAISE}rd{END}|(?<=\d){RAISE}th{END}", ""),
    # Lists, by whatever word or sign.
    (rf" ?{command('lor|vee|land|wedge')} ?", ","),
    (f",? ?{upright('(?:, ?)?(?:and|or)')}", ","),
    (rf",? ?(?<![\w\\])(?:and|or)(?!\w)(?! ?(?:{QUALIFYING})(?![a-zA-Z]))", ","),
    (r"(?<=[\d)}])(?:and|or)(?=[-\d(\\]|[A-Za-z](?:\([a-z]\))?=)", ","),  # x=1orx=4
    # Bases by name.
    (rf"_ ?\{{? ?(?:\\text ?\{{ ?)?(?:base[- ]?(\d+)|({BASES}))(?: ?\}}){{1,2}}", base_index),
    (rf"(?<=[\dA-F]) ?(?:\\text ?\{{ ?)?\(?(?:in )?base(?: ?\}})?[- ]?(\d+|{BASES})\)?(?: ?\}})?$", base_index),
    (upright(""), ""),
    ("  +", " "),
]
COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]

PLAIN = re.compile(r"-?\d+(?:\.\d+)?")
ALIGNED = re.compile(r"\\begin\{(align(?:ed|at)?\*?|gather(?:ed)?\*?|split|equation\*?)\}(.*?)\\end\{\1\}", re.DOTALL)
ARRAY = r"\\begin\{array\} ?\{[lcr| ]*\}(.*?)\\end\{array\}"
SYSTEM = re.compile(rf"\\begin\{{d?cases\}}(.*?)\\end\{{d?cases\}}|\\\{{ ?{ARRAY} ?\.?", re.DOTALL)
GRID = re.compile(
    rf"[(\[] ?(?:{ARRAY}|\\begin\{{(?:small)?matrix\}}(.*?)\\end\{{(?:small)?matrix\}}) ?[)\]]", re.DOTALL
)


@lru_cache(maxsize=4096)
def tidy(answer: str) -> str:
    """The answer without what carries no meaning: dollar signs, spacing, sizes, fonts, final punctuation, degrees."""
    if PLAIN.fullmatch(answer):
        return answer
    if not answer.isascii():
        answer = in_ascii(answer)
    for pattern, replacement in COMPILED:
        answer = pattern.sub(replacement, answer)
    if r"\begin" in answer:
        answer = with_plain_environments(answer)
    return without_braces(answer.strip())


def in_ascii(answer: str) -> str:
    """Unicode mathematics and full-width signs in LaTeX."""
    answer = re.sub("[²³¹⁰⁴-⁹⁺⁻ⁿⁱ]+", lambda match: f"^{{{match[0].translate(RAISED)}}}", answer)
    answer = re.sub("[₀-₉]+", lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", answer)
    answer = re.sub("[¼-¾⅐-⅞]", in_fraction, answer)
    answer = re.sub(r"([√∛∜]) ?(\d+(?:\.\d+)?|[a-zA-Z]|(?=[({]))", in_root, answer)
    return unicodedata.normalize("NFKC", answer.translate(SYMBOLS)).translate(SYMBOLS)


def in_fraction(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf" \frac{{{top}}}{{{bottom}}}"


def in_root(match: re.Match[str]) -> str:
    root = ROOTS[match[1]]
    if not match[2]:  # of a bracket
        return root
    return f"{root}{{{match[2]}}}"


def with_plain_environments(answer: str) -> str:
    """Aligned lines and systems as lists, arrays in brackets as matrices."""
    answer = ALIGNED.sub(lambda match: as_list(match[2]), answer)
    answer = GRID.sub(lambda match: rf"\begin{{pmatrix}}{match[1] or match[2] or ''}\end{{pmatrix}}", answer)
    return SYSTEM.sub(system, answer).strip()


def system(match: re.Match[str]) -> str:
    """Equations that hold at once as a list; cases, which have a condition each, stay what they are."""
    inside = re.sub(r"& ?(?==)", "", match[1] or match[2] or "")
    if "&" not in inside:
        return as_list(inside)
    return rf"\begin{{cases}}{inside}\end{{cases}}"


def as_list(rows: str) -> str:
    """Rows of an environment as a list, without alignment and punctuation."""
    stripped = [row.strip(" ,;.") for row in rows.replace("&", "").split(r"\\")]
    return ", ".join(row for row in stripped if row)


def without_braces(answer: str) -> str:
    """Without a pair of braces that holds it all."""
    while answer.startswith("{") and answer.endswith("}"):
        depth = 0
        for i, character in enumerate(answer):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0 and i < len(answer) - 1:
                return answer
        answer = answer[1:-1].strip()
    return answer
