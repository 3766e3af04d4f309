"""Answers written by hand or at random, and the packed computation of an objective on them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import PADDING, PER_TOKEN, Rows, pack
from dirl_cli.diffusion.states import BlockSpec, trajectory_strip
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.batch import TrajectoryGroup
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.update import self_normalised_weights
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.types import Trajectory
from tests.helpers.small import MASK, PAD
from tests.helpers.whole_batch import objective_rows

BLOCK, STOP, LONGEST = 4, 1, 16
TOKENS = BlockSpec(BLOCK, MASK)


def answer(prompt: list[int], length: int, seed: int, steps: int = 4, stop_at: int | None = None) -> Trajectory:
    """A random answer of `length` tokens, each block revealed in at most `steps` steps."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(5, 45, (length,), generator=generator).tolist()
    if stop_at is not None:
        token_ids[stop_at] = STOP
    drawn = torch.randint(1, steps + 1, (length,), generator=generator).tolist()
    blocks = [(len(prompt) + k) // BLOCK for k in range(length)]
    used = {block: sorted({step for step, b in zip(drawn, blocks, strict=True) if b == block}) for block in blocks}
    return Trajectory(
        prompt_ids=prompt,
        token_ids=token_ids,
        reveal_step=[used[block].index(step) + 1 for step, block in zip(drawn, blocks, strict=True)],
        logprobs=(-torch.rand(length, generator=generator)).tolist(),
        stop_reason="length" if stop_at is None else "stop",
        stop_token_ids=(STOP,),
    )


def with_hint(one: Trajectory, held: set[int]) -> Trajectory:
    """The answer with the tokens of these indices held from the start; its other steps as they were."""
    steps = [0 if i in held else step for i, step in enumerate(one.reveal_step)]
    return replace(one, reveal_step=steps, logprobs=[p if s else 0.0 for p, s in zip(one.logprobs, steps, strict=True)])


SIX, SEVEN, EIGHT, TWO = [5, 6, 7, 8, 9, 10], [11] * 7, [12] * 8, [13, 14]
ANSWERS = [
    [
        answer(SIX, 10, seed=0),
        answer(SIX, 2, seed=1),
        answer(SIX, 6, seed=2, stop_at=3),
    ],  # two blocks of tail; inside it
    [answer(SEVEN, 1, seed=3), answer(SEVEN, 9, seed=4, stop_at=0)],  # a single token; nothing but a stop token
    [answer(EIGHT, 8, seed=5, steps=2), answer(EIGHT, 4, seed=6, stop_at=3)],  # whole blocks
    [answer(TWO, 6, seed=7), answer(TWO, 2, seed=8, stop_at=0)],  # a prompt shorter than a block
]

# The same with hints: chunks inside blocks and over their borders, a whole block (the second of the first answer), and
# some of a tail.
HELD_TOKENS = [[{2, 3, 4, 5, 8}, {0}, {0, 4, 5}], [set(), {3, 4, 5, 6}], [{0, 1, 2, 3}, {0}], [{1, 2}, {1}]]
HINTED = [
    [with_hint(one, held) for one, held in zip(group, of_group, strict=True)]
    for group, of_group in zip(ANSWERS, HELD_TOKENS, strict=True)
]
REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0], [1.0, 0.25], [0.0, 1.0]]


def packed(
    lm: DiffusionLM,
    objective: Objective,
    groups: Sequence[TrajectoryGroup],
    old: Tensor | None = None,
    reference: Tensor | None = None,
    correction: Tensor | None = None,
    row_tokens: int = 96,
    rows_each: int = 1,
    train_tail: bool = True,
    padding: int = 0,
) -> tuple[float, Tensor, dict[str, float]]:
    """The loss of the global batch, its gradient (flat) and the other sums divided by the normaliser.

    old, reference: (answers, tokens) what to add to the log-probabilities to get those of the old and the
    reference policy; nothing by default. padding: tokens of padding behind every row.
    """
    rows, lengths = objective_rows(
        groups, objective, TOKENS, PAD, row_tokens, train_tail, torch.Generator().manual_seed(8)
    )
    norm = objective.denominator(lengths, LONGEST)
    scorer = LogprobModel(lm.model, lm.unsampled_ids)
    lm.model.zero_grad()
    answer_weights = None
    if objective.self_normalised and old is not None:
        answer_weights = weights_in_groups(rows, groups, -old, objective.clip_high)
    sums: dict[str, float] = {}
    for part in rows.split(rows_each):
        logprobs, entropy, _ = scorer(widened(part, padding))
        if answer_weights is not None:
            part.extras["answer_weight"] = answer_weights[part.extras["sample"]]
        place = part.at_targets(part.position) - prompt_lengths(groups)[part.extras["sample"]]
        for name, shift in (("old_logprobs", old), ("ref_logprobs", reference)):
            if shift is not None:
                part.extras[name] = logprobs.detach() + shift[part.extras["sample"], place]
        if correction is not None:
            part.extras["importance_weight"] = correction[part.extras["sample"]]
            part.extras["is_cut"] = torch.zeros_like(logprobs)
        for name, value in objective.loss(part, logprobs, entropy).items():
            sums[name] = sums.get(name, 0) + value.item() / norm
            if name == "loss":
                (value / norm).backward()
    return sums.pop("loss"), gradient(lm), sums


def weights_in_groups(rows: Rows, groups: Sequence[TrajectoryGroup], log_ratios: Tensor, clip_high: float) -> Tensor:
    """Each answer's weight among those to its problem: (A,), from log-ratios by answer and token (A, T)."""
    sample = rows.extras["sample"]
    index = rows.at_targets(rows.position) - prompt_lengths(groups)[sample]
    terms = rows.weight * log_ratios[sample, index] / rows.extras["length"]
    by_answer = torch.zeros(len(log_ratios)).index_add(0, sample, terms)
    return self_normalised_weights(by_answer, [len(group.trajectories) for group in groups], 1 + clip_high)


def widened(rows: Rows, columns: int) -> Rows:
    """The same rows with `columns` more tokens of padding in each."""
    if not columns:
        return rows
    fill = {"token_ids": PAD, "strip": PADDING}
    width = rows.token_ids.shape[1]
    wide = {n: torch.nn.functional.pad(getattr(rows, n), (0, columns), value=fill.get(n, 0)) for n in PER_TOKEN}
    where = rows.target_index // width * (width + columns) + rows.target_index % width
    return replace(rows, **wide, target_index=where, block_masks={})


def prompt_lengths(groups: Sequence[TrajectoryGroup]) -> Tensor:
    return torch.tensor([len(one.prompt_ids) for group in groups for one in group.trajectories])


def slopes(lm: DiffusionLM, token: int) -> tuple[float, float]:
    """How an answer's log-prob grows along a direction of a token's embedding: by autograd and by finite differences.

    The token is in the prompt, in the answer and in the padding.
    """
    weight = lm.model.get_input_embeddings().weight
    one = Trajectory([5, token, 6, 7], [token, 8, 9, token], [1, 2, 2, 1], [0.0] * 4, "length")
    rows = pack([trajectory_strip(one, lm.block_size, lm.mask_token_id)], 16, lm.block_size, token)
    direction = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)) * weight.std()

    def logprob() -> Tensor:
        return LogprobModel(lm.model, lm.unsampled_ids)(rows)[0].sum()

    with torch.no_grad():
        weight[token] = weight[8]  # a padding row begins at zero, where a norm is too steep for finite differences
    lm.model.zero_grad()
    logprob().backward()
    step = 0.01
    with torch.no_grad():
        weight[token] += step * direction
        above = logprob()
        weight[token] -= 2 * step * direction
        below = logprob()
        weight[token] += step * direction
    return (weight.grad[token] @ direction).item(), (above - below).item() / (2 * step)


def gradient(lm: DiffusionLM) -> Tensor:
    return torch.cat([parameter.grad.flatten().clone() for parameter in lm.model.parameters()])


def assert_same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor], tolerance: float = 1e-5) -> None:
    """Losses within `tolerance`, gradients within it relative to their size."""
    assert abs(ours[0] - theirs[0]) <= tolerance
    assert theirs[1].norm() > 1e-3
    assert (ours[1] - theirs[1]).norm() <= tolerance * max(1.0, float(theirs[1].norm()))
