"""The specification, as code, of every RL algorithm: its formula as the paper writes it, one forward a state.

A state is a sequence, up to the end of one of its blocks, in which some answer tokens are masked; those that a hint
held never are. An algorithm chooses states, takes the log-prob of each answer token in one or more of them, and puts it
into a formula. No rows are packed, no prompt is shared, nothing is padded. The papers are named in conf/algo/NAME.yaml.

Shapes: L tokens of a state, V of the vocabulary, A answers, T tokens of the longest answer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf, log

import torch
from torch import Generator, Tensor

from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Trajectory

# A state: its tokens, the weight of each answer token that is scored in it, by its index in the answer, and a label
# that the states of one random mask have in common.
State = tuple[list[int], dict[int, float], object]
States = Callable[[Trajectory, BlockSpec, Generator], Iterator[State]]
RewardedGroup = tuple[Sequence[Trajectory], Sequence[float]]


# Which states ---------------------------------------------------------------------------------------------------------


def drawn_tokens(answer: Trajectory) -> list[int]:
    """The indices of the answer tokens that the model drew: those that no hint held."""
    return [k for k in range(len(answer.token_ids)) if answer.reveal_step[k] > 0]


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
        drawn = [position for position in positions if position - start in drawn_tokens(answer)]
        step_of = {position: -(-answer.reveal_step[position - start] // merged) for position in drawn}
        for step in sorted(set(step_of.values())):
            masked = {position for position in drawn if step_of[position] >= step}
            scored = {position - start: 1.0 for position in drawn if step_of[position] == step}
            yield masked_state(answer, positions, masked, tokens.mask_id), scored, (positions, step)


def two_steps_as_one(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    return as_sampled(answer, tokens, generator, merged=2)


def left_to_right(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Each token with all that follow it in its block masked."""
    start = len(answer.prompt_ids)
    for positions in answer_blocks(answer, tokens.block_size):
        drawn = [position for position in positions if position - start in drawn_tokens(answer)]
        for position in drawn:
            masked = {other for other in drawn if other >= position}
            yield masked_state(answer, positions, masked, tokens.mask_id), {position - start: 1.0}, position


def three_of_the_steps(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Three steps of the trace, or all if there are no more: points at equal distances from a random start."""
    states = list(as_sampled(answer, tokens, generator))
    if len(states) <= 3:
        yield from states
        return
    start = torch.rand(1, generator=generator, dtype=torch.float64).item()
    share = 3 / len(states)
    for number, (state, scored, label) in enumerate(states):
        passed = int((number + 1) * share + start) - int(number * share + start)
        if passed:
            yield state, dict.fromkeys(scored, passed / share), label


def two_most_surprising_steps(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """The two steps whose tokens had the lowest log-probs on average, standing for all of them."""
    states = list(as_sampled(answer, tokens, generator))
    if len(states) <= 2:
        yield from states
        return
    means = [sum(answer.logprobs[k] for k in scored) / len(scored) for _, scored, _ in states]
    for mean, (state, scored, label) in zip(means, states, strict=True):
        if mean in sorted(means)[:2]:
            yield state, dict.fromkeys(scored, len(states) / 2), label


def whole_answer(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """The answer masked as a whole, and 15 % of its prompt."""
    start, length = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.token_ids)
    lost = torch.rand(length, generator=generator) < 0.15
    drawn = drawn_tokens(answer)
    masked = {position for position in range(start) if lost[position]} | {start + k for k in drawn}
    state = masked_state(answer, range(length), masked, tokens.mask_id)
    yield state, dict.fromkeys(drawn, 1.0), "all"


def one_random_mask(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Answer tokens masked at a rate between 10 and 90 %; all of them where chance took none."""
    rate = 0.1 + 0.8 * torch.rand(1, 1, generator=generator)
    drawn = drawn_tokens(answer)
    hit = (torch.rand(1, len(drawn), generator=generator) < rate)[0]
    masked = {k for k, is_hit in zip(drawn, hit, strict=True) if is_hit or not hit.any()}
    yield from under_mask(answer, tokens, masked, dict.fromkeys(masked, 1.0))


def mask_and_complement(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Answer tokens masked at a rate between 20 and 80 %, then all the others; weights are 1 / (2 · rate)."""
    rate = (0.2 + 0.6 * torch.rand(1, generator=generator)).item()
    drawn = drawn_tokens(answer)
    hit = torch.rand(len(drawn), generator=generator) < rate
    masked = {k for k, is_hit in zip(drawn, hit, strict=True) if is_hit}
    complement = {k for k in drawn if k not in masked}
    yield from under_mask(answer, tokens, masked, dict.fromkeys(masked, 1 / (2 * rate)), "mask")
    yield from under_mask(answer, tokens, complement, dict.fromkeys(complement, 1 / (2 * (1 - rate))), "complement")


def whole_mask_and_complement(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """Every block masked whole at weight 1/2, then a mask and its complement."""
    whole = drawn_tokens(answer)
    yield from under_mask(answer, tokens, set(whole), dict.fromkeys(whole, 0.5), "whole")
    yield from mask_and_complement(answer, tokens, generator)


def some_of_every_block(answer: Trajectory, tokens: BlockSpec, generator: Generator, draws: int = 2) -> Iterator[State]:
    """In each draw k of the n answer tokens of every block, weighted n / (k · draws)."""
    start = len(answer.prompt_ids)
    drawn = drawn_tokens(answer)
    blocks = []
    for positions in answer_blocks(answer, tokens.block_size):
        inside = [position - start for position in positions if position - start in drawn]
        if inside:
            blocks.append(inside)
    cells = draws * len(blocks)
    noise = (torch.randperm(cells, generator=generator) + torch.rand(cells, generator=generator)) / cells
    keys = torch.rand(draws, len(drawn), generator=generator, dtype=torch.float64)
    for draw in range(draws):
        masked: set[int] = set()
        weights: dict[int, float] = {}
        for number, inside in enumerate(blocks):
            inside.sort(key=lambda k: keys[draw, drawn.index(k)].item())
            hidden = int(noise[draw * len(blocks) + number] * len(inside)) + 1
            masked |= set(inside[:hidden])
            weights |= dict.fromkeys(inside[:hidden], len(inside) / hidden / draws)
        yield from under_mask(answer, tokens, masked, weights, draw)


def four_draws_of_every_block(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    return some_of_every_block(answer, tokens, generator, draws=4)


def two_masking_rates(answer: Trajectory, tokens: BlockSpec, generator: Generator) -> Iterator[State]:
    """21 % and 79 % of the answer masked, weighted by one half over the rate."""
    drawn = drawn_tokens(answer)
    length = len(drawn)
    for rate in (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5):
        order = torch.rand(length, generator=generator).argsort().tolist()
        masked = {drawn[i] for i in order[: max(1, round(rate * length))]}
        yield from under_mask(answer, tokens, masked, dict.fromkeys(masked, 0.5 / rate), rate)


def under_mask(
    answer: Trajectory, tokens: BlockSpec, masked: set[int], weights: dict[int, float], label: object = "mask"
) -> Iterator[State]:
    """Each block in which answer tokens of `masked` are; blocks before it are shown clean."""
    start = len(answer.prompt_ids)
    for positions in answer_blocks(answer, tokens.block_size):
        inside = {start + k for k in masked} & set(positions)
        if inside:
            scored = {position - start: weights[position - start] for position in inside}
            yield masked_state(answer, positions, inside, tokens.mask_id), scored, label


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


def nothing(rewards: Sequence[float]) -> list[float]:
    return [0.0] * len(rewards)


def best(rewards: Sequence[float]) -> list[float]:
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    return [float(reward == max(rewards)) for reward in rewards]


def softmax_contrast(rewards: Sequence[float]) -> list[float]:
    centre = sum(rewards) / len(rewards)
    up, down = [exp(reward - centre) for reward in rewards], [exp(centre - reward) for reward in rewards]
    return [good / sum(up) - bad / sum(down) for good, bad in zip(up, down, strict=True)]


# Losses of an answer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """An answer token in a state: its log-prob, by the old and the reference policy too, and its weight."""

    token: int
    label: object
    weight: float
    logprob: Tensor
    old: Tensor
    reference: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.logprob - self.old

    @property
    def to_reference(self) -> Tensor:
        return self.reference - self.logprob


def weighted(values: Iterable[tuple[float, Tensor]]) -> Tensor:
    return sum((weight * value for weight, value in values), start=torch.zeros(()))


def of(scored: Sequence[Scored], what: str) -> Tensor:
    """The weighted sum of log-probs, log-ratios or distances."""
    return weighted((one.weight, getattr(one, what)) for one in scored)


def together(scored: Sequence[Scored], key: str) -> list[list[Scored]]:
    """Those with the same label, or of the same token."""
    groups: dict[object, list[Scored]] = {}
    for one in scored:
        groups.setdefault(getattr(one, key), []).append(one)
    return list(groups.values())


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


def each_token(formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float) -> Tensor:
    """A ratio for each scored token."""
    terms = []
    for one in scored:
        term = surrogate(one.log_ratio, advantage, formula.clip_low, formula.clip_high)
        terms.append((one.weight, term + beta * formula.divergence(one.to_reference)))
    return weighted(terms)


def each_position(formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float) -> Tensor:
    """A ratio for each token of the answer, from the weighted sum of its log-probs in all states."""
    terms = []
    for same in together(scored, "token"):
        term = surrogate(of(same, "log_ratio"), advantage, formula.clip_low, formula.clip_high)
        terms.append((1.0, term + beta * formula.divergence(of(same, "to_reference"))))
    return weighted(terms)


def each_step(formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float) -> Tensor:
    """A ratio for each step: the product over its tokens."""
    terms = []
    for same in together(scored, "label"):
        log_ratio, distance = sum(one.log_ratio for one in same), sum(one.to_reference for one in same)
        term = surrogate(log_ratio, advantage, formula.clip_low, formula.clip_high)
        terms.append((same[0].weight, term + beta * formula.divergence(distance)))
    return weighted(terms)


def each_draw(formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float) -> Tensor:
    """A ratio for each of four draws: 1 + Δ for a good answer, e^Δ for a bad one, whose loss is 3 |A| at most."""
    terms = []
    for same in together(scored, "label"):
        delta = 4 * of(same, "log_ratio") / length
        ratio = 1 + delta if advantage > 0 else delta.exp()
        term = -torch.minimum(ratio * advantage, ratio.clamp(1 - formula.clip_low, 1 + formula.clip_high) * advantage)
        if advantage < 0:
            term = term.clamp(max=-3 * advantage)
        terms.append((length / 4, term + beta * formula.divergence(4 * of(same, "to_reference") / length)))
    return weighted(terms)


def whole_answer_ratio(
    formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float
) -> Tensor:
    """One ratio, the weighted geometric mean."""
    term = surrogate(of(scored, "log_ratio") / length, advantage, formula.clip_low, formula.clip_high)
    return length * (term + beta * formula.divergence(of(scored, "to_reference") / length))


def product_ratio(formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float) -> Tensor:
    """One ratio, the weighted product."""
    term = surrogate(of(scored, "log_ratio"), advantage, formula.clip_low, formula.clip_high)
    return length * (term + beta * formula.divergence(of(scored, "to_reference")))


def token_likelihood(
    formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float
) -> Tensor:
    return weighted(
        (one.weight, -advantage * one.logprob + beta * formula.divergence(one.to_reference)) for one in scored
    )


def answer_likelihood(
    formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float
) -> Tensor:
    distance = of(scored, "to_reference") / length
    return -advantage * of(scored, "logprob") + length * beta * formula.divergence(distance)


def bounded_likelihood(
    formula: "Formula", scored: Sequence[Scored], length: int, advantage: float, beta: float
) -> Tensor:
    """SPG's bound from below, and of bad answers half of it and half of the one from above. Of two draws."""
    bound = torch.stack([one.logprob for one in scored]).mean()
    if advantage < 0:
        uppers = []
        for same in together(scored, "token"):
            # the weight is 1/(n ρ): n the draws, ρ the share of the block that was masked
            uppers.append(weighted((one.weight, (1.5 * one.logprob).exp()) for one in same).log() / 1.5)
        bound = 0.5 * bound + 0.5 * torch.stack(uppers).mean()
    return length * (-advantage * bound + beta * formula.divergence(of(scored, "to_reference") / length))


# Formulas -------------------------------------------------------------------------------------------------------------


AnswerLoss = Callable[["Formula", Sequence[Scored], int, float, float], Tensor]


@dataclass(frozen=True)
class Formula:
    """loss: of an answer, summed over its tokens. mean_over: tokens, answers, or the longest allowed.

    weighs_answers: by the softmax of their log-ratios, each at most log 5, in their group.
    """

    states: States
    advantages: Callable[[Sequence[float]], list[float]]
    loss: AnswerLoss
    mean_over: str
    clip_low: float
    clip_high: float
    divergence: Callable[[Tensor], Tensor]
    weighs_answers: bool = False


FORMULAS = {
    "dipo": Formula(as_sampled, normalised, each_token, "tokens", 0.2, 0.28, k3),
    "dr_grpo": Formula(as_sampled, centred, each_token, "the longest allowed", 0.2, 0.2, k2),
    "grpo": Formula(as_sampled, normalised, each_token, "answers", 0.2, 0.2, k3),
    "tracerl": Formula(two_steps_as_one, normalised, each_token, "tokens", 0.2, 0.2, k2),
    "raft": Formula(two_steps_as_one, best, token_likelihood, "tokens", inf, inf, k2),
    "diffu_grpo": Formula(whole_answer, centred, each_token, "tokens", 0.2, 0.2, k3),
    "unigrpo": Formula(one_random_mask, normalised, each_token, "answers", 0.2, 0.2, k3),
    "coupled_masks": Formula(mask_and_complement, leave_one_out, each_token, "answers", 0.2, 0.2, k3),
    "coupled_grpo": Formula(whole_mask_and_complement, leave_one_out, each_position, "tokens", 0.5, 0.5, k3),
    "justgrpo": Formula(left_to_right, normalised, each_token, "answers", 0.2, 0.2, k3),
    "blockjustgrpo": Formula(left_to_right, normalised, each_token, "tokens", 0.2, 0.2, k3),
    "gspo": Formula(as_sampled, normalised, whole_answer_ratio, "answers", 3e-4, 4e-4, k3),
    "espo": Formula(mask_and_complement, normalised, whole_answer_ratio, "answers", 0.2, 0.2, k2),
    "gdpo": Formula(two_masking_rates, centred, whole_answer_ratio, "answers", 3e-4, 4e-4, k2),
    "bgpo": Formula(four_draws_of_every_block, normalised, each_draw, "tokens", 0.2, 0.2, k2),
    "ebpo": Formula(four_draws_of_every_block, normalised, product_ratio, "answers", 0.2, 0.2, k2),
    "agrpo": Formula(three_of_the_steps, centred, each_token, "answers", 0.2, 0.2, k2),
    "egspo": Formula(two_most_surprising_steps, centred, each_step, "answers", 0.2, 0.5, k3),
    "wd1": Formula(whole_answer, softmax_contrast, token_likelihood, "the longest allowed", inf, inf, k2),
    "opd": Formula(as_sampled, nothing, token_likelihood, "tokens", inf, inf, k2),
    "opsd": Formula(as_sampled, nothing, token_likelihood, "tokens", inf, inf, k2),
    "rspo": Formula(as_sampled, centred, answer_likelihood, "answers", inf, inf, k2),
    "spg": Formula(some_of_every_block, centred, bounded_likelihood, "tokens", inf, inf, k2),
    "stabledrl": Formula(some_of_every_block, centred, bounded_likelihood, "answers", inf, inf, k2, True),
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
    # Each answer draws from a generator of its own, so that any process can repeat it.
    seeds = torch.randint(2**62, (sum(len(answers) for answers, _ in groups),), generator=generator).tolist()

    for answers, rewards in groups:
        lengths = []  # of what the model drew and learns from
        scores = []
        for answer in answers:
            end = len(answer.token_ids) if train_tail else up_to_stop_token(answer)
            lengths.append(len([k for k in drawn_tokens(answer) if k < end]))
            states = formula.states(answer, tokens, Generator().manual_seed(seeds[sample]))
            scores.append(list(score_states(lm, answer, states, end, old[sample], reference[sample])))
            sample += 1

        answer_weights = [1.0] * len(answers)
        if formula.weighs_answers:
            log_ratios = [of(scored, "log_ratio").item() / n for scored, n in zip(scores, lengths, strict=True)]
            bounded = [exp(min(log_ratio, log(5))) for log_ratio in log_ratios]
            answer_weights = [len(answers) * one / sum(bounded) for one in bounded]

        for scored, n, advantage, answer_weight in zip(
            scores, lengths, formula.advantages(rewards), answer_weights, strict=True
        ):
            without_kl = formula.loss(formula, scored, n, advantage, 0.0)
            kl = formula.loss(formula, scored, n, advantage, beta) - without_kl
            answer_sum = answer_weight * without_kl + kl
            sum_of_sums = sum_of_sums + answer_sum
            sum_of_means = sum_of_means + answer_sum / n
            token_count += n

    if formula.mean_over == "tokens":
        return sum_of_sums / token_count
    if formula.mean_over == "the longest allowed":
        return sum_of_sums / (sample * longest)
    return sum_of_means / sample


def score_states(
    lm: DiffusionLM, answer: Trajectory, states: Iterator[State], end: int, old: Tensor, reference: Tensor
) -> Iterator[Scored]:
    """The first `end` answer tokens in each of the states that scores them."""
    for state, scored, label in states:
        logprobs = state_logprobs(lm, state)
        for k, weight in scored.items():
            if k < end:
                logprob = logprobs[len(answer.prompt_ids) + k, answer.token_ids[k]]
                before = logprob.detach() + old[k]
                yield Scored(k, label, weight, logprob, before, logprob.detach() + reference[k])


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
        for state, scored, _ in as_sampled(answer, tokens, Generator()):
            logprobs = state_logprobs(lm, state)
            for k in scored:
                answer_logprob = answer_logprob + logprobs[len(answer.prompt_ids) + k, answer.token_ids[k]]
        token_count += len(answer.token_ids)
        if normalizer == "sequence":
            answer_logprob = answer_logprob / len(answer.token_ids)
        total = total - advantage * answer_logprob
    return total / {"token": token_count, "sequence": len(answers), "constant": len(answers) * longest}[normalizer]
