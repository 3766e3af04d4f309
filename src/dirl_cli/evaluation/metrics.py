"""What a set of graded answers says about a model."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import comb, sqrt

from dirl_cli.evaluation.answers import Answer
from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.notation import number, tidy
from dirl_cli.types import Problem


@dataclass(frozen=True)
class Metrics:
    """accuracy: avg@k, the mean over problems of the share of right answers. Fractions, tokens and seconds.

    standard_error: of the accuracy over problems, s/√n with s² = Σ(aᵢ - mean)²/(n - 1) and aᵢ problem i's share of
        right answers; None for a single problem.
    length: mean tokens before the stop token. truncated: share of answers that never stopped.
    tokens_per_denoising_forward, tokens_per_forward: revealed tokens over forwards, both summed over all answers.
    tokens_per_second: revealed tokens over sampling time (of each process where there are several); None of a
        subset, which is sampled among others.
    pass_at: for each power of two up to k, and k, the chance that at least one of so many samples is right.
    majority: share of problems whose most frequent boxed answer is right (maj@k); ties count their average.

    Length, truncation and speeds are None of answers that nothing but the text is known of. Where problems have
    different numbers of answers, k is the smallest.
    """

    problems: int
    answers: int
    accuracy: float
    standard_error: float | None
    length: float | None
    truncated: float | None
    tokens_per_denoising_forward: float | None
    tokens_per_forward: float | None
    tokens_per_second: float | None
    pass_at: dict[int, float]
    majority: float | None


def measure(answers: Iterable[Answer]) -> Metrics:
    """The metrics of at least one answer."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.problem].append(answer)
    k = min(len(group) for group in groups.values())
    flat = [answer for group in groups.values() for answer in group]
    right = {problem: sum(answer.correct for answer in group) for problem, group in groups.items()}
    shares = [right[problem] / len(group) for problem, group in groups.items()]
    tokens, is_sampled = sum(answer.tokens for answer in flat), any(answer.forwards for answer in flat)

    def tokens_per(total: float) -> float | None:
        return tokens / total if total else None

    return Metrics(
        problems=len(groups),
        answers=len(flat),
        accuracy=mean(shares),
        standard_error=standard_error(shares),
        length=mean(answer.length for answer in flat) if is_sampled else None,
        truncated=mean(answer.stop_reason == "length" for answer in flat) if is_sampled else None,
        tokens_per_denoising_forward=tokens_per(sum(answer.denoise_forwards for answer in flat)),
        tokens_per_forward=tokens_per(sum(answer.forwards for answer in flat)),
        tokens_per_second=tokens_per(sum(answer.seconds for answer in flat)),
        pass_at={
            m: mean(pass_at(m, len(group), right[problem]) for problem, group in groups.items()) for m in powers(k)
        },
        majority=mean(majority(group) for group in groups.values()) if k > 1 else None,
    )


def measure_subsets(answers: Sequence[Answer], problems: Iterable[Problem]) -> dict[str, Metrics]:
    """The metrics of each subset by name, sorted; none where the problems are all of one."""
    subset = {problem.id: problem.subset for problem in problems}
    names = sorted(set(subset.values()))
    if len(names) < 2:
        return {}
    parts = {name: [answer for answer in answers if subset[answer.problem] == name] for name in names}
    return {name: replace(measure(part), tokens_per_second=None) for name, part in parts.items()}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for a single one."""
    n, middle = len(values), mean(values)
    return sqrt(sum((value - middle) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def pass_at(m: int, k: int, right: int) -> float:
    """The chance that m of k samples, drawn without replacement, hold one of the `right` ones (arXiv 2107.03374)."""
    return 1 - comb(k - right, m) / comb(k, m)


def majority(group: Iterable[Answer]) -> float:
    """1 if the most frequent boxed answer is right, 0 if not, the average over those that tie; no box is no vote."""
    votes: dict[Fraction | str, list[bool]] = defaultdict(list)
    for answer in group:
        if box := last_boxed(answer.text):
            votes[spelling(box)].append(answer.correct)
    most = max(map(len, votes.values()), default=0)
    return mean([any(correct) for correct in votes.values() if len(correct) == most] or [0.0])


def spelling(box: str) -> Fraction | str:
    """What equal answers share: their exact value where they are numbers, otherwise the text without its formatting.

    The reference answer has no part in it: to merge what it calls right, and nothing else, would favour the right.
    """
    text = tidy(box)
    value = number(text)
    return "".join(text.split()) if value is None else value


def powers(k: int) -> list[int]:
    """1, 2, 4, … up to k, and k itself; nothing for k = 1, where pass@1 is the accuracy."""
    return sorted({2**i for i in range(k.bit_length())} | {k}) if k > 1 else []
