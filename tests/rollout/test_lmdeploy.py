"""The contract with LMDeploy: its own bookkeeping, driven on a CPU, gives the trajectories of the native engine.

Only its CUDA parts are replaced: the forward, by the small model under the attention rule. Sequences, states,
stopping and batching are the installed package's.
"""

import asyncio
import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.small import MASK, VOCABULARY, random_lm, small_lm
from tests.reference.sampling import last_block_logits

pytest.importorskip("lmdeploy", reason="needs lmdeploy 0.18.0 (pip install --no-deps): `make install` brings it")

from lmdeploy.messages import ResponseType
from lmdeploy.pytorch.config import DLLMConfig, UnmaskingStrategy
from lmdeploy.pytorch.configurations.sdar import SDARModelConfigBuilder
from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
from lmdeploy.pytorch.engine.model_agent.agent import BatchedOutputs
from lmdeploy.pytorch.messages import MessageStatus, SamplingParam, SchedulerSession, SequenceMeta
from lmdeploy.pytorch.model_inputs import ModelInputs, ModelInputsDelta
from lmdeploy.pytorch.paging.seq_states.states import RunningState
from lmdeploy.pytorch.strategies.dllm.model_agent import DLLMExtraInputs
from lmdeploy.pytorch.strategies.dllm.step_inputs import DLLMStepInputs
from lmdeploy.pytorch.strategies.dllm.unmasking import UnmaskingProcessor

from dirl_cli.errors import DirlError
from dirl_cli.rollout.engines import Lmdeploy
from dirl_cli.rollout.lmdeploy import (
    LmdeployBatch,
    LmdeploySampler,
    check_prompts,
    generation_config,
    mask_token,
    run_loop_on,
)
from dirl_cli.rollout.lmdeploy_strategies import KeyedSampling, RequestTrace, TracedSequences, UnmaskingAgent
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.requests import make_requests
from dirl_cli.rollout.sampler import GivenUp, NewBlock
from dirl_cli.types import Decoding

STRATEGIES = {
    "sequential": UnmaskingStrategy.SEQUENTIAL,
    "low_confidence_static": UnmaskingStrategy.LOW_CONFIDENCE_STATIC,
    "low_confidence_dynamic": UnmaskingStrategy.LOW_CONFIDENCE_DYNAMIC,
}


@dataclass
class Lifecycle:
    """What a session asks of the scheduler: sequences run until they finish."""

    count: int = 0

    def new_sequence_id(self):
        self.count += 1
        return self.count

    def add_sequence(self, sequence, status):
        sequence.set_state(RunningState(sequence, self))

    def transition(self, sequence, state):
        sequence.set_state(state(sequence, self))


class Loop:
    """LMDeploy's engine loop: prefills of a few sequences at a time, then decoding until all have finished."""

    def __init__(self, lm, decoding):
        self.lm, self.decoding, self.size = lm, decoding, lm.block_size
        config = DLLMConfig(self.size, UnmaskingStrategy.LOW_CONFIDENCE_DYNAMIC, self.size, 0.9)
        self.agent = UnmaskingAgent(config, lm)
        self.agent.decoding = decoding
        self.sequences = TracedSequences(self.size, lm.mask_token_id)
        self.sampling = KeyedSampling(0, self.size)
        self.meta = SequenceMeta(64, strategy=self.sequences, sampling_strategy=self.sampling)
        self.steps = DLLMStepInputs(_block_size=self.size, _dllm_mask_token=lm.mask_token_id)

    @torch.inference_mode()
    def run(self, prompts, at_once=100):
        """The trace of an answer to each prompt. at_once: how many begin together; the next join two forwards later."""
        waiting = []
        for i, request in enumerate(make_requests(prompts, 1, self.decoding, None, None)):
            options = SamplingParam.from_gen_config(generation_config(request, self.decoding, self.lm))
            session = SchedulerSession(i, self.meta, Lifecycle())
            waiting.append(session.add_sequence(np.array(request.prompt_ids), options))
        running = []
        while waiting or running:
            if waiting:
                self.prefill(waiting[:at_once])
                running, waiting = self.without_finished(running + waiting[:at_once]), waiting[at_once:]
            for _ in range(2):
                running = self.without_finished(self.decode(running)) if running else []
        return [self.sequences.traces[i] for i in range(len(prompts))]

    def decode(self, running):
        sampling = self.sampling.make_sampling_inputs(running)
        inputs, extra = self.steps.model_inputs, self.steps.extra_inputs
        sampling.update_delta(self.steps.sampling_delta)
        tokens, extra, stopping = self.forward(running, inputs, extra, self.steps.stopping_criteria, sampling)
        self.steps.step_decode(inputs, extra, stopping, sampling.get_delta(), tokens, None, None)
        return running

    def prefill(self, running):
        lengths = torch.tensor([len(sequence.token_ids) for sequence in running])
        inputs = ModelInputs(
            input_ids=torch.as_tensor(np.concatenate([sequence.token_ids for sequence in running]))[None],
            seq_length=lengths,
            history_lengths=torch.zeros(len(running), dtype=torch.long),
            block_offsets=torch.zeros(len(running), 1, dtype=torch.long),
            is_decoding=False,
            num_ignored_history=torch.zeros(len(running), dtype=torch.long),
            max_q_seqlen=int(lengths.max()),
            max_kv_seqlen=int(lengths.max()),
            sum_kv_seqlen=int(lengths.sum()),
        )
        extra = self.agent.make_extra_inputs(running, inputs)
        extra = self.agent.slice_extra_inputs(extra, inputs, {})
        stopping, sampling = self.agent.make_stopping_criteria(running), self.sampling.make_sampling_inputs(running)
        tokens, extra, stopping = self.forward(running, inputs, extra, stopping, sampling)
        self.steps.merge_prefill(
            inputs, extra, stopping, sampling.get_delta(), tokens, None, self.agent.make_extra_outputs(extra)
        )

    def forward(self, running, inputs, extra, stopping, sampling):
        """What the model agent does in a step, and the engine with its outputs."""
        tokens, _, _, extra = asyncio.run(self.agent.sample(self.logits(running), inputs, extra, sampling))
        stopped, stop_pos, stopping = stopping.step(tokens, sampling.stop_words, inputs=inputs, extra_inputs=extra)
        outputs = BatchedOutputs(tokens, stopped, stop_pos, extra_outputs=self.agent.make_extra_outputs(extra))
        self.sequences.update_running(running, outputs.to_cpu(), inputs, None)
        return tokens, extra, stopping

    def logits(self, running):
        """Of each sequence's last block, all that it holds gone through the model at once."""
        found = []
        for sequence in running:
            ids = sequence.history_cache[: sequence.num_history_ids + sequence.num_token_ids]
            found.append(last_block_logits(self.lm, ids.tolist()))
        return torch.cat(found).float()

    def without_finished(self, running):
        """Those that go on, LMDeploy's batch cut down to them."""
        going = [i for i, sequence in enumerate(running) if sequence.status == MessageStatus.RUNNING]
        if not going:
            self.steps = DLLMStepInputs(_block_size=self.size, _dllm_mask_token=self.lm.mask_token_id)
        elif len(going) < len(running):
            indices = torch.tensor(going)
            blocks = torch.zeros(len(going), 1, dtype=torch.long)
            self.steps.reindex(ModelInputsDelta(indices, blocks, np.array(going), self.size, 1, 1))
        return [running[i] for i in going]


PROMPTS = [[2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17], [18], [2, 3]]


@pytest.mark.parametrize("confidence", ["sampled", "max", "entropy"])
@pytest.mark.parametrize(
    ("strategy", "steps", "threshold"),
    [
        ("sequential", 4, 0.0),
        ("sequential", 3, 0.0),
        ("low_confidence_static", 4, 0.0),
        ("low_confidence_static", 2, 0.0),
        ("low_confidence_dynamic", 4, 0.5),
        ("low_confidence_dynamic", 2, 0.3),
        ("probability_margin", 4, 0.3),
        ("entropy_bounded", 4, 1.5),
    ],
)
def test_its_bookkeeping_gives_the_native_engines_trajectories(strategy, steps, threshold, confidence):
    """Prompts that end in a block, in the midst of one, and within the first; some answers stop, others run out."""
    lm = small_lm()
    decoding = Decoding(
        strategy=strategy,
        denoising_steps=steps,
        threshold=threshold,
        confidence=confidence,
        max_new_tokens=14,
        stop_token_ids=(5, 18, 35),
    )
    expected = [answers[0] for answers in NativeSampler(lm).sample(PROMPTS, 1, decoding)]
    same(Loop(lm, decoding).run(PROMPTS), expected)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.8}])
@pytest.mark.parametrize("at_once", [100, 2, 1])
def test_random_answers_are_the_native_engines_too_whenever_they_join(at_once, truncation):
    """Each from its own key, and so with none of LMDeploy's own randomness."""
    lm = small_lm(scale=3.0)
    decoding = Decoding(
        denoising_steps=3,
        threshold=0.6,
        temperature=1.0,
        confidence="max",
        max_new_tokens=18,
        stop_token_ids=(5, 18),
        seed=7,
        **truncation,
    )
    expected = [answers[0] for answers in NativeSampler(lm).sample(PROMPTS, 1, decoding)]
    assert expected[0].token_ids != NativeSampler(lm).sample(PROMPTS, 2, decoding)[0][1].token_ids
    same(Loop(lm, decoding).run(PROMPTS, at_once), expected)


def same(traces, expected):
    assert [trace.token_ids for trace in traces] == [one.token_ids for one in expected]
    assert [trace.reveal_step for trace in traces] == [one.reveal_step for one in expected]
    for trace, one in zip(traces, expected, strict=True):
        assert trace.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert trace.denoise_forwards == one.denoise_forwards


def test_some_of_these_answers_stop_at_once_some_later_and_some_run_out():
    decoding = Decoding(max_new_tokens=14, stop_token_ids=(5, 18, 35), denoising_steps=2, strategy="sequential")
    answers = [one[0] for one in NativeSampler(small_lm()).sample(PROMPTS, 1, decoding)]
    assert {one.stop_reason for one in answers} == {"stop", "length"}
    assert any(len(one.token_ids) < 4 for one in answers), "one stops in the block that its prompt begins"


@pytest.mark.parametrize("steps", [4, 2, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_our_strategies_reveal_what_its_own_would(strategy, steps):
    """With the published confidence; for `dynamic` with as many steps as tokens, which LMDeploy takes for granted."""
    if strategy == "low_confidence_dynamic" and steps < 4:
        pytest.skip("LMDeploy's dynamic strategy owes one token a step, whatever the number of steps")
    generator = torch.Generator().manual_seed(steps)
    blocks, threshold = 200, 0.4
    states = torch.randint(0, 2, (blocks, 4), generator=generator).to(torch.uint8)  # some masked, some not
    states[:20], states[20:40] = DLLM_UNMASKED, DLLM_MASKED
    if strategy == "sequential":
        states = states.sort(-1, descending=True).values  # what is masked is at the right, as it always is there
    given = torch.where(states.flatten() == DLLM_MASKED, MASK, 7)
    logits = 3 * torch.randn(blocks * 4, VOCABULARY, generator=generator)
    logits[:, MASK] = -torch.inf

    theirs = UnmaskingProcessor(DLLMConfig(4, STRATEGIES[strategy], steps, threshold))
    expected_states, expected_tokens = theirs(logits, given, logits.argmax(-1), states.flatten().clone())
    agent = UnmaskingAgent(DLLMConfig(4, STRATEGIES[strategy], steps, threshold), small_lm())
    agent.decoding = Decoding(strategy=strategy, denoising_steps=steps, threshold=threshold)
    lengths, zeros = torch.full((blocks,), 4), torch.zeros(blocks, dtype=torch.long)
    inputs = SimpleNamespace(input_ids=given[None], seq_length=lengths, history_lengths=zeros, is_decoding=True)
    sampling = SimpleNamespace(random_seeds=zeros, random_offsets=zeros.repeat(4))
    tokens, _, _, extra = asyncio.run(agent.sample(logits, inputs, DLLMExtraInputs(states.flatten()), sampling))

    revealed = expected_states != DLLM_MASKED
    assert extra.dllm_mask.tolist() == expected_states.tolist()
    assert tokens[revealed].tolist() == expected_tokens[revealed].tolist()
    assert (extra.dllm_mask.view(-1, 4)[:20] == DLLM_CACHED).all()


def test_what_it_cannot_do_is_told():
    lm = small_lm()
    with pytest.raises(DirlError, match="strategy=bounded_adaptive wants rollout=native: LMDeploy does not"):
        check_prompts([], Decoding(strategy="bounded_adaptive"), lm, None)
    with pytest.raises(DirlError, match="watch=true wants rollout=native"):
        check_prompts([], Decoding(), lm, print)
    with pytest.raises(DirlError, match=r"decoding.block_size is 8 and the model's is 4"):
        check_prompts([], Decoding(block_size=8), lm, None)
    with pytest.raises(DirlError, match="a prompt has 256 tokens and the model has room for 255: shorten it"):
        check_prompts([[2], [2] * 256], Decoding(), lm, None)


def test_a_model_that_is_not_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DirlError, match="rollout=lmdeploy wants device=cuda, not cpu: leave rollout at native"):
        Lmdeploy(8, 0.5).start(small_lm())


def test_an_answer_gets_no_more_room_than_the_model_has_positions():
    lm = small_lm()  # 256 positions
    [request] = make_requests([[2] * 250], 1, Decoding(), None, None)
    assert generation_config(request, Decoding(max_new_tokens=100), lm).max_new_tokens == 6


class Instance:
    """Answers every request with one block of tokens, or refuses those whose prompt begins with 13."""

    def __init__(self, sequences):
        self.sequences, self.asked = sequences, []

    async def async_stream_infer(self, session, prompt_ids, options):
        self.asked.append(options)
        refused = prompt_ids[0] == 13
        trace = self.sequences().traces[session] = RequestTrace()
        trace.record(np.zeros(4), np.array([1, 0, 1, 0]), np.array([20, MASK, 22, MASK]), np.array([-1.0, 0, -2, 0]))
        await asyncio.sleep(0)
        trace.record(np.array([1, 0, 1, 0]), np.ones(4), np.array([20, 21, 22, 1]), np.array([0, -3.0, 0, -4]))
        yield SimpleNamespace(status=ResponseType.CANCEL if refused else ResponseType.FINISH)


def sampler_of(lm):
    """A sampler whose engine is a double, and what the double was asked."""
    engine = SimpleNamespace(
        executor=SimpleNamespace(model_agent=SimpleNamespace()),
        misc_config=SimpleNamespace(dllm_config=DLLMConfig(4, UnmaskingStrategy.SEQUENTIAL, 4, 0.9)),
        seq_meta=SimpleNamespace(),
        start=lambda: True,
    )
    instance = Instance(lambda: engine.seq_meta.strategy)
    engine.create_instance = lambda: instance
    return LmdeploySampler(lm, engine), instance


def test_answers_come_with_their_traces_and_seeds_of_their_own():
    sampler, instance = sampler_of(small_lm())
    sampler.weights_version = 3
    decoding = Decoding(temperature=1.0, stop_token_ids=(1,))
    (a, b), (c, _) = sampler.sample([[2, 3], [4]], 2, decoding)
    assert (a.token_ids, a.reveal_step, a.logprobs) == ([20, 21, 22, 1], [1, 2, 1, 2], [-1.0, -3.0, -2.0, -4.0])
    assert (a.stop_reason, a.denoise_forwards, a.forwards, a.weights_version) == ("stop", 2, 2, 3)
    assert (a.prompt_ids, b.prompt_ids, c.prompt_ids) == ([2, 3], [2, 3], [4])
    assert len({options.random_seed for options in instance.asked}) == 4
    assert {tuple(options.stop_token_ids) for options in instance.asked} == {(1,)}


def test_an_engine_that_nobody_samples_with_gives_back_what_it_holds():
    sampler, _ = sampler_of(small_lm())
    engine, loop, slept = sampler.engine, sampler.loop, []

    async def sleep(level):
        slept.append(level)

    engine.sleep = sleep
    sampler.sample([[2]], 1, Decoding())
    assert slept == []
    del sampler
    gc.collect()
    for _ in range(200):
        if slept and not loop.is_running():
            break
        time.sleep(0.01)
    assert slept == [2] and not loop.is_running()


def test_it_sleeps_and_wakes_with_the_weights_or_without_them():
    """Asleep, the weights are elsewhere; a push fetches them once, and waking then only what is still missing."""
    sampler, _ = sampler_of(small_lm())
    done = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def load_weights(self, weights):
            done.append(("load", [name for name, _ in weights]))

    model = Model()

    async def sleep(level):
        done.append(("sleep", level))
        model.to("meta")

    def wakeup(tags):
        done.append(("wake", tags))
        model.to_empty(device="cpu")

    sampler.engine.sleep, sampler.engine.wakeup = sleep, wakeup
    sampler.agent.patched_model, sampler.agent.all_context = SimpleNamespace(get_model=lambda: model), nullcontext
    sampler.sleep()
    sampler.wake()
    sampler.wake()
    assert done == [("sleep", 1), ("wake", None)]
    done.clear()
    sampler.sleep()
    for version in (1, 2):
        sampler.update_weights([("weight", torch.ones(1))], version)
    sampler.wake()
    assert done == [("sleep", 1), ("wake", ["weights"]), *[("load", ["weight"])] * 2, ("wake", ["kv_cache"])]


def test_a_request_that_is_given_up_ends_the_stream_with_a_sentence():
    sampler, _ = sampler_of(small_lm())
    with pytest.raises(DirlError, match=r"LMDeploy gave a request up \(CANCEL\): lower rollout.max_batch"):
        sampler.sample([[2], [13]], 1, Decoding())


def test_a_live_batch_tells_blocks_and_ends_and_lets_another_rule_wait():
    sampler, _ = sampler_of(small_lm())
    sampler.weights_version = 2
    batch = LmdeployBatch(sampler, 2, 64)
    greedy, warm = Decoding(stop_token_ids=(1,)), Decoding(temperature=1.0, stop_token_ids=(1,))
    assert batch.has_room(warm)
    batch.add(0, 0, [2, 3], greedy)
    assert batch.has_room(replace(greedy, max_new_tokens=5, seed=3)) and not batch.has_room(warm)
    batch.add(1, 0, [13], greedy)
    assert not batch.has_room(greedy), "no slot is free"
    news = []
    while batch.running:
        news += batch.step()
    given_up = [one for one in news if isinstance(one, GivenUp)]
    assert [(one.prompt, one.sample) for one in given_up] == [(1, 0)]
    assert "LMDeploy gave a request up" in given_up[0].reason
    blocks = [one for one in news if isinstance(one, NewBlock) and one.prompt == 0]
    assert [token for block in blocks for token in block.token_ids] == [20, 21, 22, 1]
    assert [value for block in blocks for value in block.logprobs] == [-1.0, -3.0, -2.0, -4.0]
    assert (blocks[-1].stop_reason, blocks[-1].forwards, blocks[-1].weights_version) == ("stop", 2, 2)
    assert batch.has_room(warm) and sampler.sequences.traces == {}

    # Of one that left nothing more is told.
    batch.add(2, 0, [2], warm)
    batch.remove(2, 0)
    assert batch.step() == [] and not batch.running


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_pushed_weights_are_ours_in_its_fused_layout(kind):
    """That of a mixture twice, since its modules make new parameters of what they were given."""
    pytest.importorskip("triton", reason="LMDeploy builds its modules with Triton's kernels")
    lm = random_lm(kind)
    theirs = their_model(lm)
    sampler, _ = sampler_of(lm)
    sampler.agent.patched_model = SimpleNamespace(get_model=lambda: theirs)
    sampler.agent.all_context = torch.inference_mode
    forgotten = []
    sampler.agent.reset_graph_runner = lambda: forgotten.append(sampler.weights_version)
    for version in (7, 8):
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter.mul_(3.0)
        sampler.update_weights(lm.model.named_parameters(), version)
        pushed, own = dict(theirs.named_parameters()), lm.model.state_dict()
        for name in [name for name in pushed if name.endswith(("qkv_proj.weight", "gate_up_proj.weight"))]:
            parts = "qkv" if "qkv" in name else ("gate", "up")
            fused = torch.cat([own[name.replace("qkv" if "qkv" in name else "gate_up", part)] for part in parts])
            assert torch.equal(pushed.pop(name), fused), name
        for name in [name for name in pushed if ".experts." in name]:
            ours = name.replace(".gate_up.weight", ".gate_up_proj").replace(".down.weight", ".down_proj")
            assert torch.equal(pushed.pop(name), own[ours]), name
        assert len(pushed) >= 11
        for name, tensor in pushed.items():
            assert torch.equal(tensor, own[name]), name
        assert sampler.weights_version == version
    # Only where it put weights elsewhere, experts in another layout or a tied head, would graphs read the old ones.
    assert forgotten == ([] if kind == "untied" else [0])


def their_model(lm):
    """LMDeploy's modules for such a model, on the CPU, with weights that mean nothing."""
    from lmdeploy.pytorch.model_inputs import BuildModelContext, StepContextManager
    from lmdeploy.pytorch.models import sdar, sdar_moe
    from lmdeploy.pytorch.models.patch import build_model_context

    context = BuildModelContext(dllm_config=DLLMConfig(4, UnmaskingStrategy.SEQUENTIAL, 4, 0.9))
    build = sdar_moe.SDARMoeForCausalLM if lm.model.config.model_type == "sdar_moe" else sdar.SDARForCausalLM
    with build_model_context(context):
        return build(lm.model.config, StepContextManager(context), dtype=torch.float32, device="cpu")


def test_its_loop_runs_on_the_models_gpu_whichever_a_thread_begins_on(monkeypatch):
    """Else the engines of all processes would compute on the first one."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in ("cuda:1", "cpu"):
        loop = asyncio.new_event_loop()
        loop.call_soon(loop.stop)
        run_loop_on(torch.device(device), loop)
    assert taken == [torch.device("cuda:1")]


def test_another_mask_token_than_the_published_one_reaches_its_configuration():
    with mask_token(49):
        assert SDARModelConfigBuilder.build(small_lm().model.config, "somewhere").dllm_mask_token == 49
    assert SDARModelConfigBuilder.build(small_lm().model.config, "somewhere").dllm_mask_token == 151669
