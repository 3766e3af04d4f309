"""Files and data sets as demonstrations or problems, and several of them mixed by weight."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any, Protocol

from dirl_cli.data.columns import demonstration, is_problem, problem, question, rename_columns, summarize_notes
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.errors import DirlError
from dirl_cli.ranges import Positive, Seed, ShareOrCount
from dirl_cli.types import Problem


class Source(Protocol):
    """What can be learned from; the embedded problems are one too."""

    @property
    def name(self) -> str: ...
    def demonstrations(self) -> list[Row]: ...
    def validation(self) -> list[Row]: ...
    def training_problems(self) -> list[Problem]: ...
    def problems(self) -> list[Problem]: ...
    def remarks(self) -> list[str]: ...


@dataclass(frozen=True)
class TrainingFile:
    """Rows to learn from: to fine-tune see `demonstration`, to reinforce see `problem`.

    path: a file, a directory of files, or a data set of the Hub; split, config: which part of the latter two.
    columns: how the file calls the columns, by our names. held_out: rows kept out of training to validate on, chosen
    by `seed`; a share below 1, otherwise a number. weight: how often it is drawn from where it is one of several.
    setting: how a user gives `columns`.
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

    def demonstrations(self) -> list[Row]:
        """The rows to learn from, in the file's order."""
        return [demonstration(row, self.setting) for row in self._parts[0]]

    def validation(self) -> list[Row]:
        """The rows held out."""
        return [demonstration(row, self.setting) for row in self._parts[1]]

    def training_problems(self) -> list[Problem]:
        """The rows to reinforce on, each a question with its answer."""
        return [problem(row, f"{self.name}-{i}") for i, row in enumerate(self._questions)]

    def remarks(self) -> list[str]:
        """What of the rows to reinforce on is read otherwise than written, or not at all."""
        return summarize_notes(self._questions)

    def problems(self) -> list[Problem]:
        """Those of the rows held out that have a question with its answer."""
        rows = [row for row in self._parts[1] if is_problem(row)]
        return [problem(row, f"{self.name}-held-out-{i}", self.setting) for i, row in enumerate(rows)]

    @cached_property
    def _questions(self) -> list[Row]:
        return [question(row, self.setting) for row in self._parts[0]]

    @cached_property
    def _parts(self) -> tuple[list[Row], list[Row]]:
        rows = rename_columns(read_rows(self.path, self.split, self.config), self.columns or {}, self.setting)
        size = round(self.held_out * len(rows)) if self.held_out < 1 else int(self.held_out)
        if not 0 <= size < len(rows):
            raise DirlError(f"{self.path} has {len(rows)} rows, so {size} cannot be held out: lower data.held_out")
        out = set(Random(self.seed).sample(range(len(rows)), size))
        return [row for i, row in enumerate(rows) if i not in out], [rows[i] for i in sorted(out)]


@dataclass(frozen=True)
class Mix:
    """Several files, drawn from in proportion to their weights, whatever their sizes."""

    name: str
    sources: list[TrainingFile]

    def __post_init__(self) -> None:
        if not self.sources:
            raise DirlError("data.sources must name at least one file")
        named = [replace(source, name=source.name or source.path, setting="columns: ") for source in self.sources]
        if len({source.name for source in named}) < len(named):
            raise DirlError("two of data.sources go by the same name: give each a name=")
        object.__setattr__(self, "sources", named)

    def problems(self) -> list[Problem]:
        """The problems held out, of each file in turn."""
        turns = zip_longest(*(source.problems() for source in self.sources))
        return [problem for problem in chain.from_iterable(turns) if problem]


def sources_of(data: Any) -> tuple[list[Source], list[float]]:
    """What is learned from, and how often each is drawn from."""
    if isinstance(data, Mix):
        return list(data.sources), [source.weight for source in data.sources]
    return [data], [1.0]


@dataclass(frozen=True)
class ProblemFile:
    """A benchmark: rows of `question` and `ground_truth_answer`, and of `id` and `subset` where there are any.

    path, split, config, columns: as of `TrainingFile`. published: results by model and decoding strategy, to compare.
    """

    name: str
    path: str
    split: str | None = None
    config: str | None = None
    columns: dict[str, str] | None = None
    published: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        """The problems in the file's order, those without a reference answer too."""
        stem = Path(self.path).stem
        problems = [problem(row, f"{stem}-{i}") for i, row in enumerate(self._questions)]
        known: set[str] = set()
        for one in problems:
            if one.id in known:
                raise DirlError(f"{self.path} holds two problems with the id {one.id}: make the ids differ")
            known.add(one.id)
        return problems

    def remarks(self) -> list[str]:
        """What of the rows is read otherwise than written, or not at all."""
        return summarize_notes(self._questions)

    @cached_property
    def _questions(self) -> list[Row]:
        rows = rename_columns(read_rows(self.path, self.split, self.config), self.columns or {}, "bench.columns=")
        return [question(row, "bench.columns=") for row in rows]
