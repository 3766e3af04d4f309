"""The specification, as code, of every RL algorithm: its formula as the paper writes it, one forward a state.

A state is a sequence, up to the end of one of its blocks, in which some answer tokens are masked. An algorithm chooses
states, takes the log-prob of each answer token in one or more of them, and puts it into a formula. No rows are packed,
no prompt is shared, nothing is padded. The papers are named in conf/algo/NAME.yaml.

Shapes: L tokens of a state, V of the vocabulary, A answers, T tokens of the longest answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Trajectory

# A state: its tokens, and the weight of each answer token that is scored in it, by its index in the answer.
State = tuple[list[int], dict[int, float]]
States = Callable[[Trajectory, BlockSpec, Generator], Iterator[State]]
RewardedGroup = tuple[Sequence[Trajectory], Sequence[float]]


# Which states ---------------------------------------------------------------------------------------------------------


def answer_blocks(answer: Trajectory, block_size: int) -> Iterator[range]:
    """The positions of answer tokens in each block of the sequence that holds any."""
    start, end = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.token_ids)
    for begin in range(start // block_size * block_size, end, block_size):
        yield range(max(begin, start), begin + block_size)


def masked_state(answer: Trajectory, positions: range, masked: set[int], mask_id: int) -> list[int]:
    """The sequence up to the end of `positions`, with the mask token at `masked`."""
    state = [*answer.prompt_ids, *answer.token_ids][: positions.stop]
    for position in masked:
        state[position] = mask_id
    return state


def as_sampled(answer: Trajectory, tokens: BlockSpec, generator: Generator, merged: int = 1) -> Iterator[State]:
    """Each block as it was before each of its denoising steps; `merged` steps in a row count as one."""
    start = len(answer.prompt_ids)
    for positions in answer_blocks(answer, tokens.block_size):
        step_of = {position: -(-answer.reveal_step[position - start] // merged) for position in positions}
        for step in sorted(set(step_of.values())):
            masked = {position for position in positions if step_of[position] >= step}
            scored = {position - start: 1.0 for position in positions if step_of[position] == step}
            yield masked_state(answer, positions, masked, tokens.mask_id), scored


def two_steps_as_one(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    return as_sampled(answer, tokens, generator, merged=2)


def left_to_right(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Each token with all that follow it in its block masked."""
    start = len(answer.prompt_ids)
    for positions in answer_blocks(answer, tokens.block_size):
        for position in positions:
            masked = set(range(position, positions.stop))
            yield masked_state(answer, positions, masked, tokens.mask_id), {position - start: 1.0}


def whole_answer(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """The answer masked as a whole, and 15 % of its prompt."""
    start, length = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.token_ids)
    lost = torch.rand(length, generator=generator) < 0.15
    masked = {position for position in range(length) if position >= start or lost[position]}
    state = masked_state(answer, range(length), masked, tokens.mask_id)
    yield state, dict.fromkeys(range(len(answer.token_ids)), 1.0)


def one_random_mask(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Answer tokens masked at a rate between 10 and 90 %; all of them where chance took none."""
    rate = 0.1 + 0.8 * torch.rand(1, 1, generator=generator)
    drawn = (torch.rand(1, len(answer.token_ids), generator=generator) < rate)[0]
    masked = {k for k in range(len(drawn)) if drawn[k] or not drawn.any()}
    yield from under_mask(answer, tokens, masked, 1.0)


def mask_and_complement(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Answer tokens masked at a rate between 20 and 80 %, then all the others; weights are 1 / (2 · rate)."""
    rate = (0.2 + 0.6 * torch.rand(1, generator=generator)).item()
    drawn = torch.rand(len(answer.token_ids), generator=generator) < rate
    masked = {k for k in range(len(drawn)) if drawn[k]}
    complement = {k for k in range(len(drawn)) if not drawn[k]}
    yield from under_mask(answer, tokens, masked, 1 / (2 * rate))
    yield from under_mask(answer, tokens, complement, 1 / (2 * (1 - rate)))


def under_mask(answer: Trajectory, tokens: BlockSpec, masked: set[int], weight: float) -> Iterator[State]:
    """Each block in which answer tokens of `masked` are; blocks before it are shown clean."""
    start = len(answer.prompt_ids)
    for positions in answer_blocks(answer, tokens.block_size):
        inside = {start + k for k in masked} & set(positions)
        if inside:
            scored = {position - start: weight for position in inside}
            yield masked_state(answer, positions, inside, tokens.mask_id), scored


def state_logprobs(lm: DiffusionLM, state: list[int]) -> Tensor:
    """(L, V) under the rule of inference: a token sees all of its own block and of those before it."""
    block = torch.arange(len(state)) // lm.block_size
    seen = block[:, None] >= block[None, :]
    logits = lm.model(input_ids=torch.tensor([state]), attention_mask=seen[None, None]).logits[0].float()
    return logits.index_fill(-1, torch.tensor(lm.unsampled_ids), -torch.inf).log_softmax(-1)


# Advantages of a group's rewards --------------------------------------------------------------------------------------


def normalised(rewards: Sequence[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    return [(reward - mean) / spread for reward in rewards]


def centred(rewards: Sequence[float]) -> list[float]:
    return [reward - sum(rewards) / len(rewards) for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    return [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]


# Terms of a token or an answer ----------------------------------------------------------------------------------------


def surrogate(log_ratio: Tensor, advantage: float, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - ε_low, 1 + ε_high) A)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def k2(to_reference: Tensor) -> Tensor:
    """to_reference: log-prob of the reference policy less the present one's."""
    return to_reference**2 / 2


def k3(to_reference: Tensor) -> Tensor:
    """to_reference: log-prob of the reference policy less the present one's."""
    return to_reference.exp() - to_reference - 1


# Formulas -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Formula:
    """mean_over: tokens, answers, the longest allowed, or one ratio an answer (which is a mean over answers)."""

    states: States
    advantages: Callable[[Sequence[float]], list[float]]
    mean_over: str
    clip_low: float
    clip_high: float
    divergence: Callable[[Tensor], Tensor]


FORMULAS = {
    "dipo": Formula(as_sampled, normalised, "tokens", 0.2, 0.28, k3),
    "dr_grpo": Formula(as_sampled, centred, "the longest allowed", 0.2, 0.2, k2),
    "grpo": Formula(as_sampled, normalised, "answers", 0.2, 0.2, k3),
    "tracerl": Formula(two_steps_as_one, normalised, "tokens", 0.2, 0.2, k2),
    "diffu_grpo": Formula(whole_answer, centred, "tokens", 0.2, 0.2, k3),
    "unigrpo": Formula(one_random_mask, normalised, "answers", 0.2, 0.2, k3),
    "coupled_masks": Formula(mask_and_complement, leave_one_out, "answers", 0.2, 0.2, k3),
    "justgrpo": Formula(left_to_right, normalised, "answers", 0.2, 0.2, k3),
    "gspo": Formula(as_sampled, normalised, "one ratio an answer", 3e-4, 4e-4, k3),
    "espo": Formula(mask_and_complement, normalised, "one ratio an answer", 0.2, 0.2, k2),
}


def algorithm_loss(
    name: str,
    lm: DiffusionLM,
    groups: Sequence[RewardedGroup],
    old: Tensor,
    reference: Tensor,
    beta: float,
    train_tail: bool,
    longest: int,
    generator: Generator,
) -> Tensor:
    """The loss of all groups together: ().

    old, reference: (A, T) what is added to a token's log-prob to get the old and the reference policy's.
    train_tail: whether tokens behind the stop token, which fill its block, count.
    longest: tokens that an answer may have at most.
    """
    formula, tokens = FORMULAS[name], BlockSpec(lm.block_size, lm.mask_token_id)
    sample, token_count = 0, 0
    sum_of_sums, sum_of_means = torch.zeros(()), torch.zeros(())

    for answers, rewards in groups:
        for answer, advantage in zip(answers, formula.advantages(rewards), strict=True):
            trained = len(answer.token_ids) if train_tail else up_to_stop_token(answer)
            answer_sum, log_ratio, to_reference = torch.zeros(()), torch.zeros(()), torch.zeros(())
            for state, scored in formula.states(answer, tokens, generator):
                logprobs = state_logprobs(lm, state)
                for k, weight in scored.items():
                    if k >= trained:
                        continue
                    logprob = logprobs[len(answer.prompt_ids) + k, answer.token_ids[k]]
                    difference = logprob - (logprob.detach() + old[sample, k])
                    distance = logprob.detach() + reference[sample, k] - logprob
                    term = surrogate(difference, advantage, formula.clip_low, formula.clip_high)
                    answer_sum = answer_sum + weight * (term + beta * formula.divergence(distance))
                    log_ratio = log_ratio + weight * difference / trained
                    to_reference = to_reference + weight * distance / trained

            if formula.mean_over == "one ratio an answer":
                term = surrogate(log_ratio, advantage, formula.clip_low, formula.clip_high)
                answer_sum = trained * (term + beta * formula.divergence(to_reference))
            sum_of_sums = sum_of_sums + answer_sum
            sum_of_means = sum_of_means + answer_sum / trained
            token_count += trained
            sample += 1

    if formula.mean_over == "tokens":
        return sum_of_sums / token_count
    if formula.mean_over == "the longest allowed":
        return sum_of_sums / (sample * longest)
    return sum_of_means / sample


def up_to_stop_token(answer: Trajectory) -> int:
    """How many tokens the answer has, its first stop token included."""
    for k, token in enumerate(answer.token_ids):
        if token in answer.stop_token_ids:
            return k + 1
    return len(answer.token_ids)


def policy_gradient_loss(
    lm: DiffusionLM, answers: Sequence[Trajectory], advantages: Sequence[float], normalizer: str, longest: int
) -> Tensor:
    """-Σ A log p / norm, whose gradient is the policy gradient where the policy is the one that sampled: ().

    normalizer: token, sequence or constant. longest: tokens that an answer may have at most.
    """
    tokens = BlockSpec(lm.block_size, lm.mask_token_id)
    total, token_count = torch.zeros(()), 0
    for answer, advantage in zip(answers, advantages, strict=True):
        answer_logprob = torch.zeros(())
        for state, scored in as_sampled(answer, tokens, Generator()):
            logprobs = state_logprobs(lm, state)
            for k in scored:
                answer_logprob = answer_logprob + logprobs[len(answer.prompt_ids) + k, answer.token_ids[k]]
        token_count += len(answer.token_ids)
        if normalizer == "sequence":
            answer_logprob = answer_logprob / len(answer.token_ids)
        total = total - advantage * answer_logprob
    return total / {"token": token_count, "sequence": len(answers), "constant": len(answers) * longest}[normalizer]
