"""Trajectories as arrays, as processes that train together exchange them: 13 bytes a token where lists take 89."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from dirl_cli.rollout.storage import Record
from dirl_cli.types import Trajectory

INT32, FLOAT32, FLOAT64 = "i", "f", "d"  # as `array` names them


def with_arrays(answers: Iterable[Record | Trajectory]) -> list[Record | Trajectory]:
    """The same answers with arrays for the lists of their trajectories; every value stays what it is.

    Answers to one prompt share its array, which so is sent once.
    """
    prompts: dict[int, Any] = {}  # by the list they were
    smaller: list[Record | Trajectory] = []
    for answer in answers:
        trajectory = answer.trajectory if isinstance(answer, Record) else answer
        key = id(trajectory.prompt_ids)
        if key not in prompts:
            prompts[key] = integer_array(trajectory.prompt_ids)
        arrays = replace(
            trajectory,
            prompt_ids=prompts[key],
            token_ids=integer_array(trajectory.token_ids),
            reveal_step=integer_array(trajectory.reveal_step),
            logprobs=float_array(trajectory.logprobs),
            versions=integer_array(trajectory.versions),
            entropies=float_array(trajectory.entropies),
        )
        smaller.append(replace(answer, trajectory=arrays) if isinstance(answer, Record) else arrays)
    return smaller


def integer_array(values: Sequence[int]) -> Any:
    """As bytes where they fit, as reveal steps do, else as an array of int32, which every token's id is."""
    try:
        return bytearray(iter(values))  # of an array itself it would copy the memory, several bytes an item
    except ValueError:
        return array(INT32, values)


def float_array(values: Sequence[float]) -> Any:
    """As an array of float32, in which the samplers compute; of float64 where that would round any."""
    narrow = array(FLOAT32, values)
    wide = array(FLOAT64, values)
    return narrow if array(FLOAT64, narrow) == wide else wide
