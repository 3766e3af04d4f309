"""Inpainted hints, so that problems which no answer solves are not lost (IGPO, arXiv 2509.10396).

Where every answer of a group is wrong, as many are sampled again with chunks of the problem's reference solution held
in them from the start, and of these some that are right take the places of the first wrong ones.

What is held is context, like the prompt: it is shown in every state, scored in none, and counts in no ratio and no
length. So a hinted answer's log-probs are exact given its hint; the expected reward without hints has another gradient.

After facebookresearch/igpo (trainer_igpo.py, utils/generate.py): how chunks are drawn, how many are held, and which
answers are taken in. There the gaps between chunks are stretched by up to 1.5, and a fifth of the held tokens is also
learned from, those of the highest entropy; here chunks stand where they stand in the solution.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from dirl_cli.errors import DirlError
from dirl_cli.rollout.sampler import Hint
from dirl_cli.rollout.storage import Record
from dirl_cli.types import Problem


@dataclass(frozen=True)
class Hints:
    """How much of a solution an answer is given, and how many such answers a group takes in.

    most: right ones in a group; 0 is off. share: of a solution's chunks that are held, drawn for each answer between
    these two. tokens: of a chunk, drawn likewise.
    """

    most: int
    share: tuple[float, float]
    tokens: tuple[int, int]

    def hint(self, solution: Sequence[int], longest: int, generator: Generator) -> Hint:
        """Chunks of a solution, of which an answer of at most `longest` tokens leaves the last one free."""
        chunks = self.chunks(min(len(solution), longest - 1), generator)
        low, high = self.share
        share = low + (high - low) * torch.rand(1, generator=generator).item()
        held = len(chunks) - int(len(chunks) * (1 - share))

        hint: dict[int, int] = {}
        for i in torch.randperm(len(chunks), generator=generator)[:held].sort().values.tolist():
            hint |= {index: solution[index] for index in chunks[i]}
        return hint

    def chunks(self, length: int, generator: Generator) -> list[range]:
        """A solution's tokens in chunks of random length; an end that is shorter than any is left out."""
        least, most = self.tokens
        chunks: list[range] = []
        start = 0
        while start < length and (length - start >= least or not chunks):
            size = int(torch.randint(least, most + 1, (1,), generator=generator))
            chunks.append(range(start, min(start + size, length)))
            start += size
        return chunks

    def take_in(self, group: Sequence[Record], hinted: Sequence[Record], generator: Generator) -> list[Record]:
        """The group with right answers among `hinted` in place of its first: drawn where they are too many.

        At least one of its own stays, for the others to be compared with.
        """
        right = [record for record in hinted if record.correct]
        room = min(self.most, len(group) - 1)
        chosen = torch.randperm(len(right), generator=generator)[:room].sort().values.tolist()
        taken = [replace(right[i], sample=wrong.sample) for i, wrong in zip(chosen, group, strict=False)]
        return [*taken, *group[len(taken) :]]


NO_HINTS = Hints(most=0, share=(0.0, 0.0), tokens=(1, 1))


def is_all_wrong(group: Sequence[Record]) -> bool:
    return bool(group) and not any(record.correct for record in group)


def require_solutions(problems: Sequence[Problem]) -> None:
    """Raises DirlError for the first problem that has no solution to take hints from."""
    for problem in problems:
        if not problem.solution.strip():
            raise DirlError(
                f"problem {problem.id} has no solution to take hints from: give its row a solution or response, such as"
                " with 'data.columns={response: …}', or leave rl.hints at 0"
            )


def cut_at(solution: Sequence[int], ends: Container[int]) -> list[int]:
    """A solution's tokens up to the first of those with which an answer ends, or which none holds."""
    for i, token in enumerate(solution):
        if token in ends:
            return list(solution[:i])
    return list(solution)
