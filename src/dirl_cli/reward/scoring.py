"""From answers to rewards, while more are being sampled: graded, given to every reward, summed by weight."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar, cast

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.ranges import Count, Finite, OneOf, Positive
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.pool import Outcome, RewardPool, attempt
from dirl_cli.reward.process import by_step
from dirl_cli.reward.ranking import RANKINGS, Contender
from dirl_cli.reward.rewards import BUILT_IN, Answer, check_options

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class RewardSettings:
    """Which rewards are summed up, by what weights, and what computes them.

    weights: by a reward's name, its import path or its file; a weight of 0 reports a reward without paying it.
    options: keyword arguments of the rewards that take any, by the same names.
    on_error: what becomes of an answer whose reward raises, hangs or is not a finite number: `stop` ends the run,
        `exclude` counts the answer and leaves it out.
    workers: processes that compare answers, and as many for rewards of the user's own.
    timeout: seconds, for each answer and each such reward.
    process: what is paid to denoising steps or blocks, by import path or file, and their weights; each gives a list.
    """

    weights: dict[str, Finite]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_error: Annotated[str, OneOf("stop", "exclude")] = "stop"
    workers: Count = 2
    timeout: Positive = 5.0
    process: dict[str, Finite] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            raise DirlError("reward.weights is empty: name at least one reward")
        for key, weights in (("weights", self.weights), ("process", self.process)):
            for name, weight in weights.items():
                # A dotted name on the command line is read as a path into the config, so that its weight is a mapping.
                if not isinstance(weight, int | float):
                    raise DirlError(
                        f"reward.{key}.{name} is no number: give a dotted name in braces, as {{{name}.…: 1}}"
                    )
        for name in self.process:
            if name in (*BUILT_IN, *RANKINGS) or name in self.weights:
                raise DirlError(f"reward.process.{name} is a reward of whole answers: name it in reward.weights alone")
        names = [*self.weights, *self.process]
        for name in self.options:
            if name not in names:
                raise DirlError(f"reward.options.{name} has no weight: {did_you_mean(name, names)}")
        for name in names:
            check_options(name, self.options.get(name, {}))

    @property
    def ranks(self) -> bool:
        """Whether answers are compared with the others to their problem."""
        return any(name in RANKINGS for name in self.weights)

    def ranked(
        self, answers: Sequence[Contender], parts: Sequence[Mapping[str, float]]
    ) -> list[tuple[float, dict[str, float]]]:
        """The rewards of the answers to a problem once all are there, and their parts, the rankings among them.

        parts: what each answer earned by itself.
        """
        ranks = {}
        for name in self.weights:
            if name in RANKINGS:
                ranks[name] = RANKINGS[name](answers, **self.options.get(name, {}))

        rewards = []
        for i, own in enumerate(parts):
            complete = {name: ranks[name][i] if name in ranks else own[name] for name in self.weights}
            rewards.append((sum(weight * complete[name] for name, weight in self.weights.items()), complete))
        return rewards


@dataclass(frozen=True)
class RewardResult:
    """An answer's reward, its parts before weighting in the order of the weights, and whether it is correct.

    process: what each denoising step earned besides, in order; empty where process rewards are not computed.
    """

    total: float
    parts: dict[str, float]
    correct: bool
    process: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Pending:
    """An answer on its way, and the outcomes of its rewards so far, by name."""

    answer: Answer
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class RewardComputer:
    """Computes the rewards of answers; use as a context.

    An answer is graded first, then every reward is computed of it, then their weighted sum. Built-in rewards are
    computed on the spot: they are arithmetic. Grading and a user's own rewards run in worker processes. What compares
    it with the others to its problem is not computed here, see `RewardSettings.ranked`.
    excluded: answers left out so far, by the reward that failed.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self.grader = Grader(settings.workers, settings.timeout)
        self.excluded: Counter[str] = Counter()
        self._weights = {name: weight for name, weight in settings.weights.items() if name not in RANKINGS}
        self._names = [*self._weights, *settings.process]
        self._own = [name for name in self._names if name not in BUILT_IN]
        self._pool = RewardPool(self._own, settings.workers, settings.timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.grader.__exit__(kind, error, trace)
        self._pool.close()

    def compute(self, answers: Iterable[tuple[Key, Answer]]) -> Iterator[tuple[Key, RewardResult | None]]:
        """The result under each answer's key, as it is reached; None for an answer that is left out.

        To be iterated to its end. Keys, such as (problem id, sample), must differ. Raises DirlError for a reward
        that fails unless such answers are excluded, and ValueError for a key that comes twice.
        """
        pending: dict[Key, Pending] = {}
        for key, answer in answers:
            if key in pending:
                raise ValueError(f"two answers under the key {key}")
            pending[key] = Pending(answer)
            self.grader.submit(key, answer.problem, answer.completion)
            yield from self._after_grading(pending, self.grader.finished())
            yield from self._after_rewards(pending, self._pool.finished())
        yield from self._after_grading(pending, self.grader.rest())
        yield from self._after_rewards(pending, self._pool.rest())

    def _after_grading(
        self, pending: dict[Key, Pending], credits: Iterator[tuple[Hashable, float]]
    ) -> Iterator[tuple[Key, RewardResult | None]]:
        """Begin to compute the rewards of graded answers; yields results where no worker has a part in them."""
        for graded_key, credit in credits:
            key = cast(Key, graded_key)
            graded = Pending(replace(pending[key].answer, verified=credit == 1, credit=credit))
            pending[key] = graded
            for name in self._names:
                options = self.settings.options.get(name, {})
                if name in BUILT_IN:
                    graded.outcomes[name] = attempt(name, graded.answer, options)
                else:
                    self._pool.submit((key, name), name, graded.answer, options)
            if not self._own:
                yield key, self._result(pending.pop(key))

    def _after_rewards(
        self, pending: dict[Key, Pending], outcomes: Iterator[tuple[Hashable, Outcome]]
    ) -> Iterator[tuple[Key, RewardResult | None]]:
        """Note what the workers computed; yields the results of answers of which nothing is missing any more."""
        for outcome_key, outcome in outcomes:
            key, name = cast(tuple[Key, str], outcome_key)
            pending[key].outcomes[name] = outcome
            if len(pending[key].outcomes) == len(self._names):
                yield key, self._result(pending.pop(key))

    def _result(self, computed: Pending) -> RewardResult | None:
        """The weighted sum, or None where a reward failed and such answers are excluded."""
        answer = computed.answer
        parts: dict[str, float] = {}
        for name in self._weights:  # whatever came first, so that sums are the same to the last bit
            outcome = computed.outcomes[name]
            if not (isinstance(outcome, float) and isfinite(outcome)):
                return self._left_out(name, answer, outcome)
            parts[name] = outcome

        process = [0.0] * sum(len(block.steps) for block in answer.blocks)
        for name, weight in self.settings.process.items():
            outcome = computed.outcomes[name]
            if not (isinstance(outcome, list) and all(map(isfinite, outcome))):
                return self._left_out(name, answer, outcome)
            try:
                values = by_step(outcome, [len(block.steps) for block in answer.blocks])
            except ValueError as error:
                return self._left_out(name, answer, f"it gave {error}")
            process = [total + weight * value for total, value in zip(process, values, strict=True)]

        total = sum(weight * parts[name] for name, weight in self._weights.items())
        return RewardResult(total, parts, answer.correct, process)

    def _left_out(self, name: str, answer: Answer, outcome: Outcome) -> RewardResult | None:
        """None, counted, for an answer of which a reward failed. Raises DirlError where none may be left out."""
        if self.settings.on_error == "exclude":
            self.excluded[name] += 1
            return None
        reason = outcome if isinstance(outcome, str) else f"it gave {outcome}"
        raise DirlError(
            f"the reward {name} failed on problem {answer.problem.id}: {reason};"
            " correct it, or leave such answers out with reward.on_error=exclude"
        )
