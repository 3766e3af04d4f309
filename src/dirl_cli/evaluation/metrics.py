"""What a set of graded answers says about a model."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from math import comb, hypot, sqrt
from statistics import NormalDist, fmean, stdev

from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.reward.boxed import final_answer
from dirl_cli.reward.notation import number
from dirl_cli.reward.tidy import tidy
from dirl_cli.reward.verifiers import has_votes
from dirl_cli.types import Problem

Z95 = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within so many standard deviations


@dataclass(frozen=True)
class Metrics:
    """accuracy: avg@k, the mean over problems of the share of right answers. Fractions, tokens and seconds.

    standard_error: of the accuracy over problems, s/√n with s² = Σ(aᵢ - mean)²/(n - 1) and aᵢ problem i's share of
        right answers; None for a single problem. It is 0 where all are alike, from which no spread can be told.
    low, high: the accuracy's 95 % wilson_interval, which holds there too; cards of earlier versions lack it.
    credit: the mean over problems of what the verifier gives, partial credit included; None where it is not known of
        every answer, as of earlier versions.
    length: mean tokens before the stop token. truncated: share of answers that never stopped.
    tokens_per_denoising_forward, tokens_per_forward: revealed tokens over forwards, both summed over all answers.
    tpf: tokens per forward as leaderboards count them: those before the stop token over all forwards, both summed;
        cards of earlier versions lack it.
    tokens_per_second: revealed tokens over sampling time (of each process where there are several); None of a
        subset, which is sampled among others.
    pass_at: for each power of two up to k, and k, the chance that at least one of so many samples is right.
    majority: share of problems whose most frequent final answer is right (maj@k); ties count their average. None of
        answers that are not spelled alike where they say the same, such as programs.

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
    low: float | None = None
    high: float | None = None
    credit: float | None = None
    tpf: float | None = None


def measure(answers: Iterable[GradedAnswer], with_votes: bool = True) -> Metrics:
    """The metrics of at least one answer. with_votes: whether the most frequent final answer says anything."""
    groups = list(by_problem(answers).values())
    k = min(len(group) for group in groups)
    shares = [correct_in(group) / len(group) for group in groups]  # aᵢ: of right answers
    flat = list(chain.from_iterable(groups))
    low, high = wilson_interval(shares, len(flat))

    pass_at_m = {}
    for m in powers(k):
        pass_at_m[m] = fmean(pass_at(m, len(group), correct_in(group)) for group in groups)
    majorities = None  # of single answers it would be the accuracy again
    if k > 1 and with_votes:
        majorities = fmean(majority(group) for group in groups)

    # Answers that came from a file cost no forward: of these nothing but the texts is known.
    tokens = sum(answer.tokens for answer in flat)
    denoise_forwards = sum(answer.denoise_forwards for answer in flat)
    forwards = sum(answer.forwards for answer in flat)
    seconds = sum(answer.seconds for answer in flat)
    length = truncated = None
    if forwards:
        length = fmean(answer.length for answer in flat)
        truncated = fmean(answer.stop_reason == "length" for answer in flat)

    return Metrics(
        problems=len(groups),
        answers=len(flat),
        accuracy=fmean(shares),
        standard_error=standard_error(shares),
        length=length,
        truncated=truncated,
        tokens_per_denoising_forward=ratio(tokens, denoise_forwards),
        tokens_per_forward=ratio(tokens, forwards),
        tokens_per_second=ratio(tokens, seconds),
        pass_at=pass_at_m,
        majority=majorities,
        low=low,
        high=high,
        credit=mean_credit(groups),
        tpf=ratio(sum(answer.length for answer in flat), forwards),
    )


def by_problem(answers: Iterable[GradedAnswer]) -> dict[str, list[GradedAnswer]]:
    """The answers to each problem, by its id."""
    groups: dict[str, list[GradedAnswer]] = defaultdict(list)
    for answer in answers:
        groups[answer.problem].append(answer)
    return groups


def correct_in(group: Iterable[GradedAnswer]) -> int:
    return sum(answer.correct for answer in group)


def ratio(total: float, count: float) -> float | None:
    """The quotient; None where nothing was counted."""
    return total / count if count else None


def mean_credit(groups: Iterable[Sequence[GradedAnswer]]) -> float | None:
    """The mean over problems of their answers' mean credit; None where one has none."""
    means = []
    for group in groups:
        credits = [answer.credit for answer in group if answer.credit is not None]
        if len(credits) < len(group):
            return None
        means.append(fmean(credits))
    return fmean(means)


def mean_over_seeds(runs: Sequence[Metrics]) -> Metrics:
    """What evaluations of the same problems measured, on average; its standard error is over the evaluations.

    What one of them does not know is not known of their mean.
    """

    def mean(values: Sequence[float | None]) -> float | None:
        measured = [value for value in values if value is not None]
        return fmean(measured) if len(measured) == len(values) else None

    accuracies = [run.accuracy for run in runs]
    mean_pass_at = {}
    for m in runs[0].pass_at:
        mean_pass_at[m] = fmean(run.pass_at[m] for run in runs)
    # Wilson's interval is of one evaluation's problems: over seeds there is the standard error alone.
    return replace(
        runs[0],
        answers=sum(run.answers for run in runs),
        accuracy=fmean(accuracies),
        standard_error=standard_error(accuracies),
        length=mean([run.length for run in runs]),
        truncated=mean([run.truncated for run in runs]),
        tokens_per_denoising_forward=mean([run.tokens_per_denoising_forward for run in runs]),
        tokens_per_forward=mean([run.tokens_per_forward for run in runs]),
        tokens_per_second=mean([run.tokens_per_second for run in runs]),
        pass_at=mean_pass_at,
        majority=mean([run.majority for run in runs]),
        low=None,
        high=None,
        credit=mean([run.credit for run in runs]),
        tpf=mean([run.tpf for run in runs]),
    )


def mean_over_benchmarks(runs: Sequence[Metrics]) -> Metrics:
    """Accuracy and credit of several benchmarks on average, each weighing alike, whatever its size.

    The standard error is that of a mean of independent values. Lengths and speeds of different tasks have no mean that
    says anything: they are None.
    """
    errors = [run.standard_error for run in runs if run.standard_error is not None]
    credits = [run.credit for run in runs if run.credit is not None]
    return Metrics(
        problems=sum(run.problems for run in runs),
        answers=sum(run.answers for run in runs),
        accuracy=fmean(run.accuracy for run in runs),
        standard_error=hypot(*errors) / len(runs) if len(errors) == len(runs) else None,
        length=None,
        truncated=None,
        tokens_per_denoising_forward=None,
        tokens_per_forward=None,
        tokens_per_second=None,
        pass_at={},
        majority=None,
        credit=fmean(credits) if len(credits) == len(runs) else None,
    )


def measure_subsets(answers: Sequence[GradedAnswer], problems: Iterable[Problem]) -> dict[str, Metrics]:
    """The metrics of each subset by name, sorted; none where the problems are all of one."""
    by_id = {problem.id: problem for problem in problems}
    names = sorted({problem.subset for problem in by_id.values()})
    if len(names) < 2:
        return {}
    by_subset: dict[str, list[GradedAnswer]] = {name: [] for name in names}
    for answer in answers:
        by_subset[by_id[answer.problem].subset].append(answer)

    # Subsets are sampled among each other: the time of one is not known.
    metrics = {}
    for name, own in by_subset.items():
        with_votes = all(has_votes(by_id[answer.problem]) for answer in own)
        metrics[name] = replace(measure(own, with_votes), tokens_per_second=None)
    return metrics


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values, s/√n; None for a single one."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def wilson_interval(shares: Sequence[float], answers: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy: of those it could be, those that do not make what was seen a rarity.

    It is that of a proportion in so many independent trials as would vary as much as the problems' shares of right
    answers do: as many as there are problems where each has one answer, up to the number of answers where problems
    are equally hard. Where no two differ, nothing tells that answers to a problem are independent: each is one trial.
    """
    n = len(shares)
    accuracy = fmean(shares)
    error = standard_error(shares)
    trials: float = n
    if error:  # the mean of t independent trials has the variance a(1 - a)/t: solved for t
        trials = min(max(accuracy * (1 - accuracy) / error**2, n), answers)

    middle = accuracy + Z95**2 / (2 * trials)
    half = Z95 * sqrt(accuracy * (1 - accuracy) / trials + (Z95 / (2 * trials)) ** 2)
    scale = 1 + Z95**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def pass_at(m: int, k: int, right: int) -> float:
    """The chance that m of k samples, drawn without replacement, hold one of the `right` ones (arXiv 2107.03374)."""
    return 1 - comb(k - right, m) / comb(k, m)


def majority(group: Iterable[GradedAnswer]) -> float:
    """1 if the most frequent final answer is right, 0 if not, the average over those that tie; none is no vote."""
    votes: dict[Fraction | str, list[bool]] = defaultdict(list)
    for answer in group:
        if final := answer.extracted or final_answer(answer.text):
            votes[spelling(final)].append(answer.correct)
    if not votes:
        return 0.0
    most = max(len(verdicts) for verdicts in votes.values())
    winners = [verdicts for verdicts in votes.values() if len(verdicts) == most]
    # An answer that was cut off counts as wrong, whatever its box holds: the others tell whether the box is right.
    return fmean(any(verdicts) for verdicts in winners)


def spelling(final: str) -> Fraction | str:
    """What equal answers share: their exact value where they are numbers, otherwise the text without its formatting.

    The reference answer has no part in it: to merge what it calls right, and nothing else, would favour the right.
    """
    text = tidy(final)
    value = number(text)
    if value is None:
        return "".join(text.split())
    return value


def powers(k: int) -> list[int]:
    """1, 2, 4, … up to k, and k itself; nothing for k = 1, where pass@1 is the accuracy."""
    if k == 1:
        return []
    return sorted({2**i for i in range(k.bit_length())} | {k})
