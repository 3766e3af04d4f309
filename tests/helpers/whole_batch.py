"""All rows of an objective at once, as one process makes them."""

from collections.abc import Sequence

from torch import Generator

from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.rl.batch import ObjectiveRows, TrajectoryGroup
from dirl_cli.rl.objective import Objective


def objective_rows(
    groups: Sequence[TrajectoryGroup],
    objective: Objective,
    spec: BlockSpec,
    pad_id: int,
    row_tokens: int,
    train_tail: bool,
    generator: Generator,
) -> tuple[Rows, list[int]]:
    """The rows, and each answer's number of trained tokens."""
    rows = ObjectiveRows(groups, objective, spec, pad_id, row_tokens, train_tail, generator)
    return rows.rows(rows.bins), rows.lengths
