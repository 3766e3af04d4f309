"""Files and data sets as demonstrations or problems, and several of them mixed by weight."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any, Protocol

from dirl_cli.data.columns import rename_columns, summarize_notes
from dirl_cli.data.demonstration_rows import demonstration, pair
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.data.verified_rows import is_verifiable, name_verifiers, verified_problem, verified_question
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Positive, Seed, ShareOrCount
from dirl_cli.types import Problem


class Source(Protocol):
    """Anything that can be learned from, the embedded problems among them."""

    @property
    def name(self) -> str: ...
    def demonstrations(self) -> list[Row]: ...
    def validation(self) -> list[Row]: ...
    def training_problems(self) -> list[Problem]: ...
    def problems(self) -> list[Problem]: ...
    def remarks(self) -> list[str]: ...


@dataclass(frozen=True)
class TrainingFile:
    """Rows to learn from; `demonstration` and `verified_problem` say what of a row is used.

    path: a file, a directory of files, or a data set of the Hub; split, config: which part of the latter two.
    columns: how the file calls the columns, by our names. held_out: rows kept out of training to validate on, chosen
    by `seed`; a share below 1, otherwise a number. weight: how often it is drawn from where it is one of several.
    setting: how a user gives `columns`. verifier, scorers: as in `name_verifiers`.
    """

    path: str
    name: str = ""
    split: str | None = None
    config: str | None = None
    columns: dict[str, str] | None = None
    held_out: ShareOrCount = 0
    seed: Seed = 0
    weight: Positive = 1.0
    setting: str = "data.columns="
    verifier: str | None = None
    scorers: list[str] = field(default_factory=list)

    def demonstrations(self) -> list[Row]:
        """The rows to learn from, in the file's order."""
        training, _ = self._splits
        return [demonstration(row, self.setting) for row in training]

    def validation(self) -> list[Row]:
        """The rows held out."""
        _, held_out = self._splits
        return [demonstration(row, self.setting) for row in held_out]

    def pairs(self) -> list[tuple[Row, Row]]:
        """The rows to prefer by, each as the demonstrations of its chosen and of its rejected answer."""
        training, _ = self._splits
        return [pair(row, self.setting) for row in training]

    def validation_pairs(self) -> list[tuple[Row, Row]]:
        """The pairs held out."""
        _, held_out = self._splits
        return [pair(row, self.setting) for row in held_out]

    def training_problems(self) -> list[Problem]:
        """The rows to reinforce on, each a question with its answer."""
        return [verified_problem(row, f"{self.name}-{i}") for i, row in enumerate(self._questions)]

    def remarks(self) -> list[str]:
        """Lines on what of the rows to reinforce on is read otherwise than written, or not at all."""
        return summarize_notes(self._questions)

    def problems(self) -> list[Problem]:
        """The problems among the rows held out."""
        _, held_out = self._splits
        rows = [verified_question(row, self.setting) for row in held_out if is_verifiable(row)]
        return [verified_problem(row, f"{self.name}-held-out-{i}", self.setting) for i, row in enumerate(rows)]

    @cached_property
    def _questions(self) -> list[Row]:
        training, _ = self._splits
        return [verified_question(row, self.setting) for row in training]

    @cached_property
    def _splits(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on and those held out, each in the file's order."""
        rows = rename_columns(read_rows(self.path, self.split, self.config), self.columns or {}, self.setting)
        rows = name_verifiers(rows, self.verifier, self.scorers, self.setting)
        size = int(self.held_out)
        if self.held_out < 1:
            size = round(self.held_out * len(rows))
        if not 0 <= size < len(rows):
            raise DirlError(f"{self.path} has {len(rows)} rows, so {size} cannot be held out: lower data.held_out")

        # Drawn by the rows' number and the seed alone: two runs on a file hold out the same ones.
        held_out = set(Random(self.seed).sample(range(len(rows)), size))
        training_rows: list[Row] = []
        held_out_rows: list[Row] = []
        for i, row in enumerate(rows):
            if i in held_out:
                held_out_rows.append(row)
            else:
                training_rows.append(row)
        return training_rows, held_out_rows


@dataclass(frozen=True)
class Mix:
    """Several files, drawn from in proportion to their weights, whatever their sizes."""

    name: str
    sources: list[TrainingFile]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DirlError("data.sources must name at least one file")
        named = [replace(source, name=source.name or source.path, setting="columns: ") for source in self.sources]
        names = {source.name for source in named}
        if len(names) < len(named):
            raise DirlError("two of data.sources go by the same name: give each a name=")
        object.__setattr__(self, "sources", named)

    def problems(self) -> list[Problem]:
        """The problems held out, of each file in turn."""
        # One of each at a time, so that the first few, which is what a limit leaves, are of all files.
        by_source = [source.problems() for source in self.sources]
        in_turn = chain.from_iterable(zip_longest(*by_source))
        return [problem for problem in in_turn if problem]


def trusted_scorers(data: Any) -> set[str]:
    """The scorers of the user's own that a data config names: what else names code does not run it."""
    sources, _ = sources_of(data)
    scorers: set[str] = set()
    for source in sources:
        if isinstance(source, TrainingFile):
            scorers |= {*source.scorers, source.verifier or ""}
    return scorers


def sources_of(data: Any) -> tuple[list[Source], list[float]]:
    """The sources of a data config and their weights, one where it is no mixture."""
    if isinstance(data, Mix):
        return list(data.sources), [source.weight for source in data.sources]
    return [data], [1.0]


@dataclass(frozen=True)
class ProblemFile:
    """A benchmark: rows of `question` and `ground_truth_answer`, and of `id` and `subset` where there are any.

    path, split, config, columns, verifier, scorers: as those of `TrainingFile`. published: results by model and
    decoding strategy, to compare with.
    """

    name: str
    path: str
    split: str | None = None
    config: str | None = None
    columns: dict[str, str] | None = None
    published: dict[str, Any] = field(default_factory=dict)
    verifier: str | None = None
    scorers: list[str] = field(default_factory=list)

    def problems(self) -> list[Problem]:
        """The problems in the file's order, those without a reference answer too.

        Raises DirlError where two have the same id.
        """
        stem = Path(self.path).stem
        problems = [verified_problem(row, f"{stem}-{i}") for i, row in enumerate(self._questions)]
        ids: set[str] = set()
        for item in problems:
            if item.id in ids:
                raise DirlError(f"{self.path} holds two problems with the id {item.id}: make the ids differ")
            ids.add(item.id)
        return problems

    def remarks(self) -> list[str]:
        """Lines on what of the rows is read otherwise than written, or not at all."""
        return summarize_notes(self._questions)

    @cached_property
    def _questions(self) -> list[Row]:
        rows = rename_columns(read_rows(self.path, self.split, self.config), self.columns or {}, "bench.columns=")
        rows = name_verifiers(rows, self.verifier, self.scorers, "bench.columns=")
        return [verified_question(row, "bench.columns=") for row in rows]
