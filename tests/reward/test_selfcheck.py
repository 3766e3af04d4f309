r"""The ground truth against itself: on the five benchmarks each answer is right for its row and wrong for the next.

Golds are styled, rewritten and spoilt by string operations and exact fractions alone, not by the code under test.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from dirl_cli.reward.grading import Grader
from tests.helpers.asked import asked

ROWS = {"MATH500": 500, "GSM8K": 1319, "AIME2024": 30, "AIME2025": 30, "OlympiadBench": 675}

# The exceptions, all of them: what is judged amiss today, by benchmark and row.
WRONG_FOR_ITSELF: dict[tuple[str, int], str] = {}
WRONG_WHEN_REWRITTEN = {
    ("OlympiadBench", 16): "f(n)=n: to math-verify a single letter is only itself, not 2n/2",
    ("OlympiadBench", 99): "f(n)=n, too",
    ("OlympiadBench", 101): "f(z)=z",
    ("OlympiadBench", 122): "N=n",
    ("OlympiadBench", 96): "t(0,4]: no notation for 0 < t ≤ 4",
}
RIGHT_WHEN_SPOILT: dict[tuple[str, int], str] = {}

NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")


def bare(gold: str) -> str:
    return re.sub(r"(?<!\\)\$", "", gold).lstrip().rstrip(" .")


def key(gold: str) -> str:
    """Equal for golds that are plainly the same."""
    return re.sub(r"^[a-z]=|\s|\^\\circ", "", bare(gold))


def parts(text: str) -> list[str]:
    """What commas part, those in brackets aside."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def as_it_stands(gold: str) -> str:
    return gold


def styled(gold: str) -> str:
    """The same symbols, set otherwise."""
    text = re.sub(r"\\[dt]?frac", r"\\dfrac", bare(gold))
    text = re.sub(r"(?<!left)\(", r"\\left(", re.sub(r"(?<!right)\)", r"\\right)", text))
    text = re.sub(r",(?!\\!|\d{3}(?!\d))", r",\\, ", text)
    return rf"\displaystyle {text}\,."


def rewritten(gold: str) -> str | None:
    """The same by algebra: lists in reverse, n as 2n/2; None for what algebra does not hold for, such as words."""
    text = bare(gold).replace(r"^\circ", "").replace(r"^{\circ}", "")
    if re.search(r"text|mbox|%|_\{?\d|\\pm|\\cup|\\in|\\ge|\\\$|matrix|\\!|\d,\d{3}", text):
        return None
    if len(parts(text)) > 1:
        return ",".join(reversed(parts(text)))
    name, equals, value = text.rpartition("=")
    if NUMBER.fullmatch(value):
        exact = Fraction(value.replace("-.", "-0."))
        return rf"{name}{equals}\frac{{{2 * exact.numerator}}}{{{2 * exact.denominator}}}"
    if re.match(r"(?:\\left|\\quad)?[(\[]", value) or value == "0" or re.search(r"\d ?\\frac", value):
        return None
    return rf"{name}{equals}\frac{{2 \cdot \left({value}\right)}}{{2}}"


def spoilt(gold: str) -> Iterator[str]:
    """Answers that differ: a number plus one, the other sign, an element dropped, two swapped, a bracket changed."""
    text = bare(gold)
    digits = list(re.finditer(r"\d+", text))
    for number in {number.start(): number for number in (digits[:1] + digits[-1:])}.values():
        yield f"{text[: number.start()]}{int(number[0]) + 1}{text[number.end() :]}"
    if NUMBER.fullmatch(text) and Fraction(text.replace("-.", "-0.")) != 0:
        yield text.removeprefix("-") if text.startswith("-") else f"-{text}"
    if len(parts(text)) > 1:
        yield ",".join(parts(text)[1:])
        yield ",".join(parts(text)[:-1])
    pair = re.search(r"([(\[])([^()\[\],]+),([^()\[\],]+)(.*?)([)\]])", text)
    if pair:
        before, (opening, first, second, more, closing), after = text[: pair.start()], pair.groups(), text[pair.end() :]
        if first.strip() != second.strip():
            yield f"{before}{opening}{second},{first}{more}{closing}{after}"
        yield f"{before}{opening}{second}{more}{closing}{after}"
        if not more:
            yield f"{before}{'[' if opening == '(' else '('}{first},{second}{closing}{after}"


FIVE = [*((name, 1) for name in ROWS if name != "OlympiadBench"), ("OlympiadBench", 9)]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's golds, and the rows that are looked at."""

    name: str
    golds: list[str]
    rows: range

    def listed(self, exceptions: dict[tuple[str, int], str]) -> set[int]:
        return {i for name, i in exceptions if name == self.name and i in self.rows}


@pytest.fixture(scope="module", params=[*FIVE, pytest.param(("OlympiadBench", 1), marks=pytest.mark.slow)], ids=str)
def benchmark(request: pytest.FixtureRequest, shared: Path) -> Benchmark:
    name, step = request.param
    golds = [row["ground_truth_answer"] for row in json.loads((shared / "data" / f"{name}.json").read_text())]
    assert len(golds) == ROWS[name]
    return Benchmark(name, golds, range(0, len(golds), step))


def judged(golds: list[str], answers: list[tuple[int, str]]) -> tuple[set[int], set[int]]:
    """The rows of which an answer, boxed in prose, is right, and those of which one is wrong."""
    items = [
        ((i, k), asked(golds[i]), rf"So it is $\boxed{{{answer} }}$, as asked.")
        for k, (i, answer) in enumerate(answers)
    ]
    with Grader(timeout=60.0) as grader:
        verdicts = dict(grader.grade(items))
        assert len(verdicts) == len(items) and grader.gave_up == 0
    rows = {verdict: {i for (i, k), _, _ in items if verdicts[i, k] == verdict} for verdict in (True, False)}
    return rows[True], rows[False]


@pytest.mark.parametrize("form", [as_it_stands, styled])
def test_every_gold_is_right_for_itself(benchmark: Benchmark, form: Callable[[str], str]) -> None:
    _, wrong = judged(benchmark.golds, [(i, form(benchmark.golds[i])) for i in benchmark.rows])
    assert wrong == benchmark.listed(WRONG_FOR_ITSELF)
    assert len(wrong) <= len(benchmark.golds) / 100


def test_every_gold_is_right_when_algebra_writes_it_otherwise(benchmark: Benchmark) -> None:
    otherwise = [(i, text) for i in benchmark.rows if (text := rewritten(benchmark.golds[i])) is not None]
    _, wrong = judged(benchmark.golds, otherwise)
    assert wrong == benchmark.listed(WRONG_WHEN_REWRITTEN)
    assert len(wrong) <= len(benchmark.golds) / 100


def test_the_next_gold_is_wrong_unless_it_is_the_same(benchmark: Benchmark) -> None:
    golds = benchmark.golds
    following = golds[1:] + golds[:1]
    right, _ = judged(golds, [(i, following[i]) for i in benchmark.rows])
    assert right == {i for i in benchmark.rows if key(golds[i]) == key(following[i])}


def test_a_spoilt_gold_is_wrong(benchmark: Benchmark) -> None:
    answers = [(i, text) for i in benchmark.rows for text in spoilt(benchmark.golds[i])]
    assert len(answers) >= len(benchmark.rows)
    right, _ = judged(benchmark.golds, answers)
    assert right == benchmark.listed(RIGHT_WHEN_SPOILT)
