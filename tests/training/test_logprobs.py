"""Scoring tokens: chunks, packing and backends change nothing, and slow definitions agree."""

import subprocess
import sys

import pytest
import torch

from dirl_cli.diffusion.layout import Rows, pack
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.errors import DirlError
from dirl_cli.models.attention import dense_mask
from dirl_cli.plan.memory import LEARNING_ENTROPY, SCORING
from dirl_cli.training.logprobs import LogprobModel, is_plain, linear_logprobs, tokens_at_once, trajectory_logprobs
from dirl_cli.types import Decoding
from tests.helpers.answers import ANSWERS, BLOCK
from tests.helpers.measured import Live
from tests.helpers.paths import ROOT
from tests.helpers.shared_scorer import backpropagate, shared_rows
from tests.helpers.small import MASK, PAD, random_lm, small_lm

TRAJECTORIES = [one for group in ANSWERS for one in group]


def rows(row_tokens: int = 64) -> Rows:
    return pack([trajectory_strip(one, BLOCK, MASK) for one in TRAJECTORIES], row_tokens, BLOCK, PAD)


def gradient(scorer: LogprobModel, packed: Rows) -> torch.Tensor:
    scorer.zero_grad()
    logprobs, entropy, _ = scorer(packed)
    (logprobs + 0.1 * entropy).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in scorer.model.parameters()])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_change_neither_log_probs_nor_gradients(chunk):
    lm, packed = small_lm(), rows()
    whole, chunked = (LogprobModel(lm.model, lm.unsampled_ids, chunk=size) for size in (10_000, chunk))
    for found, expected in zip(chunked(packed), whole(packed), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    expected = gradient(whole, packed).clone()
    torch.testing.assert_close(gradient(chunked, packed), expected, atol=1e-4, rtol=1e-4)


def linear_case(n: int = 11, width: int = 16, vocabulary: int = 40) -> tuple[torch.Tensor, ...]:
    """Hidden states, a head's weight, targets, and what a loss says of each log-prob; one of them nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, width, generator=generator).requires_grad_() for rows in (n, vocabulary))
    targets = torch.randint(2, vocabulary, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator)
    upstream[3] = 0
    return hidden, weight, targets, upstream


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("unsampled", [[], [0, 1]])
def test_linear_log_probs_and_their_gradients_are_those_of_all_logits_in_fp64(temperature, chunk, unsampled):
    hidden, weight, targets, upstream = linear_case()
    unsampled = torch.tensor(unsampled, dtype=torch.long)
    logits = (hidden.double() @ weight.double().T / temperature).index_fill(1, unsampled, -torch.inf)
    expected = logits.log_softmax(1)
    spread = -(expected.exp() * expected.clamp(min=-1e300)).sum(1)
    expected = expected.gather(1, targets[:, None]).squeeze(1)
    losses = [(expected * upstream).sum(), (spread * upstream).sum(), ((expected - 0.3 * spread) * upstream).sum()]
    slopes = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in losses]
    logprobs, entropies, likeliest = linear_logprobs(hidden, weight, targets, temperature, unsampled, chunk)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies.double(), spread, rtol=1e-6, atol=1e-5)
    assert torch.equal(likeliest, logits.argmax(1) == targets)
    losses = [
        (logprobs * upstream).sum(),
        (entropies * upstream).sum(),
        ((logprobs - 0.3 * entropies) * upstream).sum(),
    ]
    for loss, expected_slopes in zip(losses, slopes, strict=True):
        found = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        for ours, theirs in zip(found, expected_slopes, strict=True):
            assert (ours - theirs).norm() <= 3e-6 * theirs.norm()


@pytest.mark.parametrize("unsampled", [[], [0, 1]])
@pytest.mark.parametrize(("temperature", "other"), [(1.0, 0.5), (0.7, 1.4)])
def test_entropies_may_be_of_another_temperature_than_log_probs(unsampled, temperature, other):
    hidden, weight, targets, upstream = linear_case()
    unsampled = torch.tensor(unsampled, dtype=torch.long)
    logits = (hidden.double() @ weight.double().T).index_fill(1, unsampled, -torch.inf)
    expected = (logits / temperature).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    cooler = (logits / other).log_softmax(1)
    spread = -(cooler.exp() * cooler.clamp(min=-1e300)).sum(1)
    slopes = torch.autograd.grad(((expected - 0.3 * spread) * upstream).sum(), (hidden, weight))

    logprobs, entropies, likeliest = linear_logprobs(hidden, weight, targets, temperature, unsampled, 4, other)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies.double(), spread, rtol=1e-6, atol=1e-5)
    assert torch.equal(likeliest, logits.argmax(1) == targets)
    found = torch.autograd.grad(((logprobs - 0.3 * entropies) * upstream).sum(), (hidden, weight))
    for ours, theirs in zip(found, slopes, strict=True):
        assert (ours - theirs).norm() <= 3e-6 * theirs.norm()


def test_a_hooked_head_takes_entropies_at_their_temperature_too():
    lm, packed = small_lm(), rows()
    expected = LogprobModel(lm.model, lm.unsampled_ids, entropy_temperature=0.5)(packed)
    lm.model.lm_head.register_forward_hook(lambda *_: None)
    found = LogprobModel(lm.model, lm.unsampled_ids, entropy_temperature=0.5)(packed)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_head_that_does_not_learn_lets_the_gradient_through():
    hidden, weight, targets, upstream = linear_case()
    none = torch.tensor([], dtype=torch.long)
    slopes = []
    for learns in (True, False):
        logprobs, *_ = linear_logprobs(hidden, weight.detach().requires_grad_(learns), targets, 1.0, none, 4)
        slopes.append(torch.autograd.grad((logprobs * upstream).sum(), hidden)[0])
    assert torch.equal(*slopes)


def test_under_autocast_products_are_rounded_and_the_softmax_is_not():
    hidden, weight, targets, upstream = linear_case()
    none = torch.tensor([], dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, *_ = linear_logprobs(hidden, weight, targets, 1.0, none, 4)
        expected = (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad((each * upstream).sum(), (hidden, weight)) for each in (logprobs, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_chunk_has_two_copies_of_its_logits_and_no_more(autocast):
    hidden, weight, targets, upstream = linear_case(n=64, width=2, vocabulary=5000)
    none = torch.tensor([], dtype=torch.long)
    copies = 2 * 4 * 16 * 5000
    with Live() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logprobs, *_ = linear_logprobs(hidden, weight, targets, 0.7, none, 16)
        assert live.peak - weight.nbytes < 1.02 * copies
        assert live.now - weight.nbytes < 0.02 * copies  # what is kept for the backward
        (logprobs * upstream).sum().backward()
    assert live.peak - 2 * weight.nbytes < 1.02 * copies


@pytest.mark.parametrize("entropy_temperature", [None, 0.5])
def test_while_entropies_are_learned_from_there_are_three(entropy_temperature):
    hidden, weight, targets, upstream = linear_case(n=64, width=2, vocabulary=5000)
    none = torch.tensor([], dtype=torch.long)
    with Live() as live:
        logprobs, entropies, _ = linear_logprobs(hidden, weight, targets, 1.0, none, 16, entropy_temperature)
        assert live.peak - weight.nbytes < 1.02 * SCORING * 16 * 5000
        ((logprobs + entropies) * upstream).sum().backward()
    assert 2.5 < (live.peak - 2 * weight.nbytes) / (4 * 16 * 5000) < 1.02 * LEARNING_ENTROPY / 4


def test_as_many_tokens_are_scored_at_once_as_their_logits_allow():
    assert tokens_at_once(32_000) == 2048
    assert tokens_at_once(151_936) == 1766
    assert tokens_at_once(2**30) == 1


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_that_is_called_as_a_module_gives_the_same_log_probs_and_gradients(kind, autocast):
    packed, found = rows(), []
    for hooked in (False, True):
        lm = random_lm(kind)
        if hooked:
            lm.model.lm_head.register_forward_hook(lambda *_: None)
        assert is_plain(lm.model.lm_head) != hooked
        scorer = LogprobModel(lm.model, lm.unsampled_ids, chunk=7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = scorer(packed)
        scores[0].sum().backward()
        found.append((*scores, torch.cat([parameter.grad.flatten() for parameter in lm.model.parameters()])))
    (logprobs, entropies, likeliest, slope), (expected, spread, likely, steepness) = found
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropies, spread, rtol=1e-6, atol=1e-5)
    assert torch.equal(likeliest, likely)
    assert (slope - steepness).norm() <= (0.01 if autocast else 1e-5) * steepness.norm()


def test_of_tokens_that_are_equally_likely_one_is_the_likeliest():
    hidden, weight, targets, _ = linear_case()
    weight, targets = weight.detach()[[2, 2, 2]], torch.arange(len(targets)) % 3
    none = torch.tensor([], dtype=torch.long)
    _, _, likeliest = linear_logprobs(hidden.detach(), weight, targets, 1.0, none, chunk=4)
    assert torch.equal(likeliest, targets == 0)


def test_what_is_hooked_to_a_head_is_heard():
    lm, packed = small_lm(), rows()
    cooler = LogprobModel(lm.model, lm.unsampled_ids, Decoding(temperature=0.5))(packed)[0]
    lm.model.lm_head.register_forward_hook(lambda head, inputs, logits: 2 * logits)
    torch.testing.assert_close(LogprobModel(lm.model, lm.unsampled_ids)(packed)[0], cooler, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "wrapper"),
    [(kind, wrapper) for wrapper in ("data_parallel", "sharded") for kind in ("untied", "tied")]
    + [("untied", "sharded_head")],
)
def test_processes_that_share_a_scorer_have_the_gradients_of_one(kind, wrapper, tmp_path):
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [*torchrun, "-m", "tests.helpers.shared_scorer"]
    subprocess.run([*script, kind, wrapper, tmp_path / "gradients"], cwd=ROOT, check=True)
    lm = random_lm(kind)
    scorer = LogprobModel(lm.model, lm.unsampled_ids)
    backpropagate(scorer, shared_rows())
    for ours, parameter in zip(torch.load(tmp_path / "gradients"), scorer.parameters(), strict=True):
        assert (ours - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


@pytest.mark.parametrize("decoding", [Decoding(temperature=1.0), Decoding(temperature=0.7, top_k=5, top_p=0.9)])
def test_log_probs_and_entropy_are_those_of_the_full_logits(decoding):
    lm, packed = small_lm(), rows()
    with torch.no_grad():
        mask = dense_mask(packed.coordinates)
        logits = lm.model(packed.token_ids, position_ids=packed.position, attention_mask=mask).logits
        logits = logits.flatten(0, 1)[packed.target_index].double()
        logits[:, MASK] = -torch.inf
        logits /= decoding.temperature
        own = logits.gather(1, packed.targets[:, None])
        if decoding.top_k:
            logits[logits < logits.topk(decoding.top_k).values[:, -1:]] = -torch.inf
            ordered, places = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= decoding.top_p
            logits[torch.zeros_like(beyond).scatter(1, places, beyond)] = -torch.inf
            assert (logits.gather(1, packed.targets[:, None]) == -torch.inf).any()  # some tokens lie outside …
            logits.scatter_(1, packed.targets[:, None], own)  # … and are scored all the same
        logprobs = logits.log_softmax(-1)
        expected = logprobs.gather(1, packed.targets[:, None]).squeeze(1)
        expected_entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)
        found, entropy, likeliest = LogprobModel(lm.model, lm.unsampled_ids, decoding)(packed)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-4, rtol=0)
    assert torch.equal(likeliest, logprobs.argmax(1) == packed.targets)


def test_the_mask_token_is_in_no_softmax_that_scores_tokens_except_where_it_is_asked_for():
    lm, packed = small_lm(), rows()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[MASK] = 30 * lm.model.get_output_embeddings().weight[:MASK].abs().max()
        without, with_mask = LogprobModel(lm.model, (MASK,))(packed)[0], LogprobModel(lm.model)(packed)[0]
    assert (without >= with_mask).all() and (without > with_mask + 1).any()


@pytest.mark.parametrize("row_tokens", [8, 40, 4096])
def test_packing_changes_no_score(row_tokens):
    lm = small_lm()
    expected = [trajectory_logprobs(lm, [one])[0] for one in TRAJECTORIES]
    found = trajectory_logprobs(lm, TRAJECTORIES, row_tokens=row_tokens, rows_each=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_flex_attention_scores_as_sdpa_does():
    dense, flex = small_lm(), small_lm(attention="flex_attention")
    with torch.no_grad():
        expected, found = (LogprobModel(lm.model, lm.unsampled_ids)(rows()) for lm in (dense, flex))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_flex_attention_cannot_learn_on_a_cpu_and_says_so():
    lm = small_lm(attention="flex_attention")
    with pytest.raises(DirlError, match="attention=flex cannot learn on a CPU: leave it at auto"):
        LogprobModel(lm.model)(rows())


def test_a_temperature_of_zero_is_scored_as_one():
    lm = small_lm()
    assert trajectory_logprobs(lm, TRAJECTORIES, Decoding(temperature=0.0)) == trajectory_logprobs(lm, TRAJECTORIES)
