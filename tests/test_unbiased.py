"""The policy gradient against the true gradient of expected reward, over every trajectory of a model that has few.

The sampler's own functions are walked: each candidate in turn is drawn with its exact probability, the strategy picks
what is revealed, and so on to the end of the block. Candidates that are not revealed are forgotten, and where they had
a say in what was (`confidence: sampled`), the log-probs of the revealed tokens are no longer those of the action.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from dirl_cli.algo.batch import Group, objective_rows
from dirl_cli.algo.views import Tokens
from dirl_cli.build import build
from dirl_cli.diffusion.sampling import draw
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal
from dirl_cli.models.checkpoint import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import TokenScorer
from dirl_cli.types import Decoding, Trajectory

USABLE, MASK = 2, 2
THRESHOLD = {"sampled": 0.7, "max": 0.9, "entropy": 0.7}  # at which a dynamic step reveals now one token, now several
PROMPT = [0, 1, 1, 0]


def toy(block_size: int) -> DiffusionLM:
    """Two tokens and the mask, random and sharp."""
    config = SDARConfig(
        vocab_size=USABLE + 1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    model = SDARForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12.0)
    return diffusion_lm(model, None, block_size, MASK)


def block_logits(lm: DiffusionLM, block: list[int]) -> Tensor:
    """(B, V) of a block behind the prompt."""
    state = torch.tensor([PROMPT + block])
    number = torch.arange(state.shape[1]) // lm.block_size
    seen = number[:, None] >= number[None, :]
    return lm.model(input_ids=state, attention_mask=seen[None, None]).logits[0, len(PROMPT) :]


def choose(logits: Tensor, tokens: tuple[int, ...], masked: list[bool], step: int, decoding: Decoding) -> list[bool]:
    """What the sampler reveals when `tokens` are the candidates it draws at the masked places."""
    where = torch.tensor(masked)
    cumulative = (
        logits.detach()[where].softmax(-1).double().cumsum(-1)
    )  # (N, V): aim at the middle of each token's share
    at = torch.tensor(tokens)[:, None]
    below = torch.where(at > 0, cumulative.gather(-1, (at - 1).clamp(min=0)), torch.zeros((), dtype=torch.double))
    middle = (below + cumulative.gather(-1, at)).squeeze(-1) / 2
    drawn = draw(logits.detach()[where], middle, 1.0, 0, 1.0, decoding.confidence, torch.tensor([], dtype=torch.long))
    assert drawn.tokens.tolist() == list(tokens)
    owed = quota(torch.tensor([step]), len(masked), decoding.denoising_steps)
    state = State(where[None], drawn, owed, decoding.threshold)
    return reveal(find_strategy(decoding.strategy), state)[0].tolist()


def trajectories(
    lm: DiffusionLM, decoding: Decoding, block: list[int], revealed_at: list[int], step: int = 1
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """(tokens, reveal steps, probability as a function of the parameters) of every way to fill the block."""
    if MASK not in block:
        yield tuple(block), tuple(revealed_at), torch.ones(())
        return
    masked = [token == MASK for token in block]
    logits = block_logits(lm, block)[:, :USABLE].float()
    probabilities = logits.softmax(-1)
    places = [place for place, is_masked in enumerate(masked) if is_masked]
    ways: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
    for tokens in product(range(USABLE), repeat=len(places)):
        probability = torch.stack([probabilities[p, t] for p, t in zip(places, tokens, strict=True)]).prod()
        chosen = choose(logits, tokens, masked, step, decoding)
        candidate = dict(zip(places, tokens, strict=True))
        after = tuple(candidate[p] if chosen[p] else block[p] for p in range(len(block)))
        at = tuple(step if chosen[p] else revealed_at[p] for p in range(len(block)))
        ways[after, at] = ways.get((after, at), torch.zeros(())) + probability
    for (after, at), probability in ways.items():
        for tokens, steps, rest in trajectories(lm, decoding, list(after), list(at), step + 1):
            yield tokens, steps, probability * rest


def reward(tokens: tuple[int, ...]) -> float:
    """Something that asks for tokens together: which of two sides of the cube they are on, plus a little."""
    return float(tokens[0] != tokens[-1]) + 0.3 * tokens[0]


def gradients(lm: DiffusionLM, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Of minus the expected reward: the true one, and the one that the objective computes on average."""
    size = lm.block_size
    found = list(trajectories(lm, decoding, [MASK] * size, [0] * size))
    probabilities = torch.stack([probability for *_, probability in found])
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    rewards = torch.tensor([reward(tokens) for tokens, *_ in found])
    parameters = list(lm.model.parameters())
    true = torch.autograd.grad(-(probabilities * rewards).sum(), parameters, allow_unused=True, materialize_grads=True)

    taken = [Trajectory(PROMPT, list(tokens), list(steps), [0.0] * size, "length") for tokens, steps, _ in found]
    worth = (probabilities * (rewards - 0.5)).tolist()  # a baseline may not matter
    objective = build(OmegaConf.load(Path(__file__).parents[1] / "conf" / "algo" / "dipo.yaml"))
    rows, _ = objective_rows([Group(taken, worth)], objective, Tokens(size, MASK), 0, 4096, True, torch.Generator())
    logprobs, entropy, _ = TokenScorer(lm.model, lm.unsampled_ids)(rows)
    rows.notes["old"] = logprobs.detach()
    loss = objective.loss(rows, logprobs, entropy)["loss"]
    estimated = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in true]), torch.cat([g.flatten() for g in estimated])


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def options(strategy: str, confidence: str, steps: int) -> Decoding:
    threshold = 1.0 if strategy == "entropy_bounded" else THRESHOLD[confidence]
    return Decoding(
        strategy=strategy,
        confidence=confidence,
        denoising_steps=steps,
        threshold=threshold,
        temperature=1.0,
        max_new_tokens=1,
    )


EXACT = [
    ("sequential", "sampled"),  # takes no notice of confidence
    ("low_confidence_static", "max"),
    ("low_confidence_static", "entropy"),
    ("low_confidence_dynamic", "max"),
    ("low_confidence_dynamic", "entropy"),
    ("entropy_bounded", "sampled"),  # goes by entropy alone
]


@pytest.mark.parametrize(("block_size", "steps"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize(("strategy", "confidence"), EXACT)
def test_the_policy_gradient_is_the_true_one_where_tokens_have_no_say_in_the_order(
    strategy, confidence, block_size, steps
):
    true, estimated = gradients(toy(block_size), options(strategy, confidence, steps))
    assert true.norm() > 0.1
    assert (estimated - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("strategy", ["low_confidence_static", "low_confidence_dynamic"])
def test_it_is_biased_where_the_confidence_is_that_of_the_drawn_token(strategy):
    true, estimated = gradients(toy(4), options(strategy, "sampled", 4))
    found = cosine(true, estimated)
    print(f"\n{strategy}, confidence sampled: cosine {found:.2f} with the true gradient")
    assert found < 0.99


@pytest.mark.parametrize("confidence", ["sampled", "max", "entropy"])
def test_dynamic_trajectories_differ_in_the_number_of_their_steps(confidence):
    with torch.no_grad():
        found = list(trajectories(toy(4), options("low_confidence_dynamic", confidence, 4), [MASK] * 4, [0] * 4))
    assert {max(steps) for _, steps, _ in found} == {2, 3, 4}


@pytest.mark.parametrize("confidence", ["sampled", "max"])
def test_the_sampler_takes_these_trajectories_as_often_as_computed(confidence):
    lm, decoding, n = toy(2), options("low_confidence_static", confidence, 2), 4000
    with torch.no_grad():
        computed = {(t, s): p.item() for t, s, p in trajectories(lm, decoding, [MASK] * 2, [0] * 2)}
    [sampled] = NativeSampler(lm, max_batch=1000).sample([PROMPT], n, decoding)
    counted = Counter((tuple(one.token_ids), tuple(one.reveal_step)) for one in sampled)
    assert set(counted) <= set(computed)
    assert sum(abs(counted[way] / n - p) for way, p in computed.items()) / 2 < 0.03
