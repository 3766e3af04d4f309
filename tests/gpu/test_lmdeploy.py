"""LMDeploy on a GPU against the native engine and the slow loop, on random weights of two shapes."""

from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from benchmarks.gpu import shapes
from dirl_cli.api import load_sampler
from dirl_cli.models.load import diffusion_lm
from dirl_cli.models.sdar import SDARMoeConfig, SDARMoeForCausalLM
from dirl_cli.rollout.engines import Lmdeploy
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import Decoding
from tests.helpers.divergence import first_divergence
from tests.reference.sampling import greedy_answer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("lmdeploy"), reason="needs CUDA and lmdeploy"),
]
PROMPTS = [[10, 11, 12, 13], [20, 21, 22, 23, 24, 25], [30], [40, 41, 42, 43, 44, 45, 46]]
STRATEGIES = {
    "sequential": Decoding(strategy="sequential", max_new_tokens=16),
    "static": Decoding(strategy="low_confidence_static", denoising_steps=2, max_new_tokens=16),
    "uneven": Decoding(strategy="low_confidence_static", denoising_steps=3, max_new_tokens=16),
    "dynamic": Decoding(strategy="low_confidence_dynamic", threshold=0.02, max_new_tokens=16),
}
BF16 = 0.1  # nats: what rounding to 8 bits may tip or shift


@pytest.fixture(scope="module", params=["toy", "1.7B"])
def engines(request):
    """The model in bf16, and both engines with its weights."""
    lm = shapes.random_model(request.param, "sdpa")
    theirs = shapes.lmdeploy(lm, 16, 0.2)
    yield lm, NativeSampler(lm), theirs
    theirs.sleep()


@pytest.mark.parametrize("name", STRATEGIES)
def test_greedy_answers_are_the_slow_loops_but_where_bf16_tips_a_decision(engines, name):
    lm, decoding = engines[0], STRATEGIES[name]
    slow = [greedy_answer(lm, prompt, decoding) for prompt in PROMPTS]
    for engine in engines[1:]:
        answers = [one for [one] in engine.sample(PROMPTS, 1, decoding)]
        for right, one in zip(slow, answers, strict=True):
            found = first_divergence(lm, right, one, decoding)
            same = found.after if found else len(right.token_ids)
            print(f"{type(engine).__name__}, {name}: {same} of {len(right.token_ids)} tokens alike; {found}")
            assert found is None or found.margin < BF16, found
            assert one.logprobs[:same] == pytest.approx(right.logprobs[:same], abs=BF16)
            assert len(one.token_ids) == len(right.token_ids)


def test_log_probs_at_reveal_are_the_trainers(engines):
    lm, _, theirs = engines
    decoding = Decoding(temperature=1.0, confidence="max", max_new_tokens=24)
    for shape in (decoding, replace(decoding, temperature=0.7, top_k=50)):
        trajectories = [one for group in theirs.sample(PROMPTS, 2, shape) for one in group]
        scored = trajectory_logprobs(lm, trajectories, shape)
        pairs = [
            pair for one, own in zip(trajectories, scored, strict=True) for pair in zip(one.logprobs, own, strict=True)
        ]
        differences = [abs(a - b) for a, b in pairs]
        print(f"mismatch: mean {sum(differences) / len(differences):.4f}, largest {max(differences):.4f} nats")
        assert max(differences) < 3 * BF16


def test_an_answer_is_its_seeds_whatever_else_is_sampled(engines):
    _, _, theirs = engines
    decoding = Decoding(temperature=1.0, max_new_tokens=24)
    [[alone]] = theirs.sample(PROMPTS[1:2], 1, decoding)
    assert theirs.sample(PROMPTS[1:2], 1, decoding) == [[alone]]
    among = theirs.sample(PROMPTS, 3, decoding)[1][0]
    shared = sum(a == b for a, b in zip(alone.token_ids, among.token_ids, strict=True))
    print(f"{shared} of {len(alone.token_ids)} tokens alike beside others (a batch of another size rounds otherwise)")
    assert alone.token_ids[:1] == among.token_ids[:1]
    [[other]] = theirs.sample(PROMPTS[1:2], 1, replace(decoding, seed=1))
    assert alone.token_ids != other.token_ids


def test_it_stops_where_the_native_engine_does(engines):
    _, ours, theirs = engines
    free = Decoding(strategy="sequential", max_new_tokens=16)
    stops = {one.token_ids[5] for [one] in ours.sample(PROMPTS, 1, free)}
    decoding = replace(free, stop_token_ids=tuple(stops))
    pairs = zip(ours.sample(PROMPTS, 1, decoding), theirs.sample(PROMPTS, 1, decoding), strict=True)
    for [one], [other] in pairs:
        if one.token_ids[: len(other.token_ids)] == other.token_ids:  # else bf16 tipped a token before
            assert (one.token_ids, one.stop_reason) == (other.token_ids, other.stop_reason)


def test_sleep_gives_memory_back_and_new_weights_wake_with_it(engines):
    lm, _, theirs = engines
    decoding = Decoding(max_new_tokens=8)
    before = [one.token_ids for [one] in theirs.sample(PROMPTS, 1, decoding)]
    held = torch.cuda.memory_allocated()
    theirs.sleep()
    own = sum(parameter.nbytes for parameter in lm.model.parameters())
    assert torch.cuda.memory_allocated() < held - own
    theirs.wake()
    assert [one.token_ids for [one] in theirs.sample(PROMPTS, 1, decoding)] == before

    theirs.sleep()
    with torch.no_grad():
        lm.model.lm_head.weight.copy_(lm.model.lm_head.weight.roll(1, 0))
    theirs.update_weights(lm.model.named_parameters(), version=5)
    theirs.wake()
    after = [one for [one] in theirs.sample(PROMPTS, 1, decoding)]
    assert {one.weights_version for one in after} == {5}
    assert [one.token_ids for one in after] != before
    for right, one in zip([greedy_answer(lm, prompt, decoding) for prompt in PROMPTS], after, strict=True):
        found = first_divergence(lm, right, one, decoding)
        assert found is None or found.margin < BF16, found


def test_a_push_without_a_sleep_is_seen_by_captured_graphs(engines):
    lm, _, theirs = engines
    decoding = Decoding(strategy="sequential", max_new_tokens=8)
    theirs.sample(PROMPTS, 1, decoding)
    with torch.no_grad():
        lm.model.lm_head.weight.copy_(lm.model.lm_head.weight.roll(1, 0))
    theirs.update_weights(lm.model.named_parameters(), version=6)
    for prompt, [one] in zip(PROMPTS, theirs.sample(PROMPTS, 1, decoding), strict=True):
        found = first_divergence(lm, greedy_answer(lm, prompt, decoding), one, decoding)
        assert found is None or found.margin < BF16, found


@pytest.mark.parametrize("experts", [8, 128])
def test_its_kernels_for_experts_compute_what_a_loop_does(experts):
    """Seen on an H100: a mixture of 8 experts whose answers have nothing to do with its weights.

    Interpreted on a CPU the kernels are right (tests/rollout/test_experts_of_lmdeploy.py). Here the routing is looked
    at by itself, then the sums, then both in a graph.
    """
    from lmdeploy.pytorch.kernels.cuda.moe import fused_moe

    torch.manual_seed(0)
    for tokens in (4, 7, 32):
        hidden = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        gate_up = torch.randn(experts, 256, 256, device="cuda", dtype=torch.bfloat16) / 16  # (E, in, 2 I)
        down = torch.randn(experts, 128, 256, device="cuda", dtype=torch.bfloat16) / 11  # (E, I, out)
        weights, ids = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(2)

        order, first, end = fused_moe._get_sorted_idx(ids, experts)
        counts = ids.flatten().bincount(minlength=experts)
        assert end.tolist() == counts.cumsum(0).tolist()
        assert first.tolist() == (counts.cumsum(0) - counts).tolist()
        assert ids.flatten()[order.long()].tolist() == sorted(ids.flatten().tolist())
        assert sorted(order.tolist()) == list(range(2 * tokens))

        def theirs(hidden=hidden, gate_up=gate_up, down=down, weights=weights, ids=ids) -> torch.Tensor:
            return fused_moe.fused_moe(hidden, gate_up.mT, down.mT, weights, ids, 2, renormalize=True)

        expected = torch.zeros(tokens, 256, device="cuda")
        for token, slot in product(range(tokens), range(2)):
            gate, up = (hidden[token] @ gate_up[ids[token, slot]]).float().chunk(2)
            share = weights[token, slot] / weights[token].sum()
            expected[token] += share * ((gate.sigmoid() * gate * up).bfloat16() @ down[ids[token, slot]]).float()
        torch.testing.assert_close(theirs().float(), expected, atol=0.05, rtol=0.05)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = theirs()
        captured.zero_()
        graph.replay()
        torch.testing.assert_close(captured.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("forgets", [False, True])  # graphs that were captured before the weights came
def test_a_mixture_of_experts_answers_with_pushed_weights(forgets):
    config = SDARMoeConfig(
        vocab_size=shapes.VOCABULARY,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=512,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    lm = diffusion_lm(SDARMoeForCausalLM(config).to("cuda", torch.bfloat16).eval(), None, shapes.BLOCK, shapes.MASK)
    theirs = shapes.lmdeploy(lm, 8, 0.1)
    decoding = Decoding(strategy="sequential", max_new_tokens=8)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.mul_(1.5)
        theirs.update_weights(lm.model.named_parameters(), version)
        if forgets:
            theirs.agent.reset_graph_runner()
        for prompt, [one] in zip(PROMPTS, theirs.sample(PROMPTS, 1, decoding), strict=True):
            found = first_divergence(lm, greedy_answer(lm, prompt, decoding), one, decoding)
            print(version, prompt, found)
            assert found is None or found.margin < 3 * BF16, found  # a rounded router may choose another expert
    theirs.sleep()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_engine_computes_on_the_gpu_of_its_model():
    lm = shapes.random_model("toy", "sdpa")
    lm.model.to("cuda:1")
    before = torch.cuda.memory_allocated(0)
    theirs = shapes.lmdeploy(lm, 8, 0.1)
    assert {parameter.device.index for parameter in theirs.agent.patched_model.get_model().parameters()} == {1}
    theirs.sample(PROMPTS, 1, Decoding(max_new_tokens=8))
    theirs.sleep()
    theirs.wake()
    theirs.sample(PROMPTS, 1, Decoding(max_new_tokens=8))
    assert torch.cuda.memory_allocated(0) == before
    theirs.sleep()
    torch.cuda.set_device(0)


def test_from_python_as_in_the_quick_start(tmp_path):
    lm = shapes.random_model("toy", "sdpa")
    path = shapes.saved(lm, tmp_path / "model")
    sampler = load_sampler(path, rollout="lmdeploy", max_batch=4, cache_share=0.1)
    [[answer]] = sampler.sample([[10, 11, 12, 13]], 1, Decoding(max_new_tokens=8))
    assert len(answer.token_ids) == len(answer.reveal_step) == len(answer.logprobs) == 8
    sampler.sleep()
    again = load_sampler(path, rollout=Lmdeploy(4, 0.1))
    assert again.sample([[10, 11, 12, 13]], 1, Decoding(max_new_tokens=8)) == [[answer]]
    again.sleep()


def test_a_live_batch_gives_the_answers_of_its_streams(engines):
    _, _, theirs = engines
    decoding = STRATEGIES["static"]
    expected = [one for [one] in theirs.sample(PROMPTS, 1, decoding)]
    batch = theirs.open_batch(64)
    answers = []
    for i, prompt in enumerate(PROMPTS):
        batch.add(i, 0, prompt, decoding)
        answers.append([])
    while batch.running:
        for block in batch.step():
            answers[block.prompt] += block.token_ids
    batch.close()
    alike = sum(tokens == one.token_ids for tokens, one in zip(answers, expected, strict=True))
    assert [len(tokens) for tokens in answers] == [len(one.token_ids) for one in expected] and alike >= 3
