"""LMDeploy's PyTorch engine, the released package, giving the trajectories that it does not keep.

Three of its strategies are subclassed: the agent's, in which this toolkit draws tokens, scores them and decides what is
revealed, as the native engine does and from the same randomness; the sampling's, which hands each request's key to it;
and the sequence's, which writes down what was revealed when. The engine lives in this process and on the GPU of its
model, so that each process of a run has one of its own.
"""

import asyncio
import logging
import queue
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from threading import Thread
from typing import Any
from weakref import finalize

import numpy as np
import torch
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.config import DLLMConfig
from lmdeploy.pytorch.configurations.sdar import SDARModelConfigBuilder
from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
from lmdeploy.pytorch.engine import Engine
from lmdeploy.pytorch.engine.logits_process import SamplingInputs
from lmdeploy.pytorch.model_inputs import ModelInputs
from lmdeploy.pytorch.strategies.dllm.model_agent import DLLMExtraInputs, DLLMExtraOutputs, DLLMModelAgentStrategy
from lmdeploy.pytorch.strategies.dllm.sampling import DLLMSamplingStrategy
from lmdeploy.pytorch.strategies.dllm.sequence import DLLMSequenceStrategy, SchedulerSequenceDLLM
from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading
from torch import Tensor

from dirl_cli.diffusion.sampling import draw, uniform
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.save import published_weights
from dirl_cli.rollout.sampler import Watch, collect_samples
from dirl_cli.rollout.scheduler import Request, make_requests
from dirl_cli.types import Decoding, Trajectory


@dataclass
class Trace:
    """What became of a request, block by block. The lists grow by whole blocks, prompt tokens left out."""

    token_ids: list[int] = field(default_factory=list)
    reveal_step: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: int = 0
    denoise_forwards: int = 0
    block: "Block | None" = None

    def record(self, before: np.ndarray, after: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Note what a forward did to the current block. All (B,); before and after: LMDeploy's states of its tokens."""
        self.forwards += 1
        revealed = (before == DLLM_MASKED) & (after == DLLM_UNMASKED)
        if not revealed.any():
            return
        self.denoise_forwards += 1
        block = self.block = self.block or Block.of(before)
        block.step += 1
        block.reveal_step[revealed] = block.step
        block.logprobs[revealed] = logprobs[revealed]
        if (after != DLLM_MASKED).all():
            self.token_ids += token_ids[block.answer].tolist()
            self.reveal_step += block.reveal_step[block.answer].tolist()
            self.logprobs += block.logprobs[block.answer].tolist()
            self.block = None


@dataclass
class Block:
    """A block in the midst of denoising. answer: (B,) which tokens are not the prompt's."""

    answer: np.ndarray
    reveal_step: np.ndarray
    logprobs: np.ndarray
    step: int = 0

    @classmethod
    def of(cls, states: np.ndarray) -> "Block":
        """The block at its first denoising step."""
        return cls(states == DLLM_MASKED, np.zeros(len(states), dtype=np.int64), np.zeros(len(states)))


@dataclass
class ScoredInputs(DLLMExtraInputs):
    """LMDeploy's, with the log-probs of what the last forward drew: (sequences x B,)."""

    logprobs: Tensor


@dataclass
class ScoredOutputs(DLLMExtraOutputs):
    """Likewise, on the way to the sequences."""

    logprobs: Tensor


@dataclass(frozen=True)
class Everywhere(State):
    """Blocks with a candidate for every token, masked or not, so that no shape waits for the GPU to count them."""

    @cached_property
    def confidence(self) -> Tensor:
        return self.candidates.confidence.view(self.masked.shape) * self.masked

    @cached_property
    def entropy(self) -> Tensor:
        return self.candidates.entropy.view(self.masked.shape) * self.masked


class Agent(DLLMModelAgentStrategy):
    """Draws, scores and reveals by this toolkit's rules. `decoding` is that of the requests in flight."""

    def __init__(self, config: DLLMConfig, lm: DiffusionLM) -> None:
        super().__init__(config, lm.mask_token_id)
        self.unsampled = torch.tensor(lm.unsampled_ids, device=lm.device)
        self.decoding = Decoding()

    async def sample(
        self, logits: Tensor, inputs: ModelInputs, extra_inputs: DLLMExtraInputs, sampling: SamplingInputs
    ) -> tuple[Tensor, None, Tensor, ScoredInputs]:
        """In place of the model agent's `async_sampling_logits`, which sorts the vocabulary and spreads seeds wrongly.

        logits: (sequences x B, V) of the last blocks, as the model gives them. Returns their tokens with the drawn
        ones in masked places (twice, as LMDeploy wants them), their states and log-probs.
        """
        options, size = self.decoding, self.block_size
        given = self.slice_outputs(inputs.input_ids.flatten(), inputs.seq_length)
        states = extra_inputs.dllm_mask.view(-1, size)
        written = (states == DLLM_UNMASKED).all(1, keepdim=True)  # this forward cached their keys and values
        states = states.masked_fill(written, DLLM_CACHED)
        masked = states == DLLM_MASKED
        step = self._step(inputs, sampling, written.squeeze(1))
        start = inputs.history_lengths + inputs.seq_length - size
        position = start[:, None] + torch.arange(size, device=given.device)
        noise = uniform(sampling.random_seeds[:, None], position, step[:, None]).flatten()
        drawn = draw(
            logits,
            noise if options.temperature else None,
            options.temperature,
            options.top_k,
            options.top_p,
            options.confidence,
            self.unsampled,
        )
        state = Everywhere(masked, drawn, quota(step, size, options.denoising_steps), options.threshold, start)
        states = states.masked_fill(reveal(find_strategy(options.strategy), state), DLLM_UNMASKED)
        tokens = torch.where(masked.flatten(), drawn.tokens, given)
        return tokens, None, tokens, ScoredInputs(states.flatten(), drawn.logprobs)

    def _step(self, inputs: ModelInputs, sampling: SamplingInputs, written: Tensor) -> Tensor:
        """The denoising step that each sequence's block is at, from 1. (sequences,).

        LMDeploy carries an offset for each token from forward to forward, and adds 1: here it counts steps.
        """
        offsets = sampling.random_offsets.view(-1, self.block_size)[:, 0]
        step = (offsets if inputs.is_decoding else torch.zeros_like(offsets)) + 1
        sampling.random_offsets = torch.where(written, -1, step - 1).repeat_interleave(self.block_size)
        return step

    def make_extra_outputs(self, extra_inputs: ScoredInputs) -> ScoredOutputs:
        return ScoredOutputs(extra_inputs.dllm_mask, extra_inputs.logprobs)


class Keys(DLLMSamplingStrategy):
    """Hands over the keys of requests: whole, one a sequence and also for greedy ones, which LMDeploy would not."""

    def make_sampling_inputs(self, seqs: list[Any]) -> SamplingInputs:
        inputs = super().make_sampling_inputs(seqs)
        inputs.random_seeds = torch.tensor([sequence.sampling_param.random_seed for sequence in seqs])
        return inputs


class TracedSequence(SchedulerSequenceDLLM):
    """A sequence that keeps its trace. logprobs: (B,) of the forward that it is about to be updated with."""

    trace: Trace
    logprobs: np.ndarray

    def _update_token_ids_inputs(self, token_ids: np.ndarray, dllm_mask: np.ndarray) -> None:
        super()._update_token_ids_inputs(token_ids, dllm_mask)
        self.output_start_pos = self.num_valid_ids  # LMDeploy sees no stop token in the block that the prompt begins

    def _update_token_ids_decode(self, token_ids: np.ndarray, dllm_mask: np.ndarray) -> None:
        before = self.dllm_mask.copy()
        super()._update_token_ids_decode(token_ids, dllm_mask)
        self.trace.record(before, dllm_mask, token_ids, self.logprobs)


class TracedSequences(DLLMSequenceStrategy):
    """Makes traced sequences and keeps their traces by session."""

    def __init__(self, block_size: int, dllm_mask_token: int) -> None:
        super().__init__(block_size, dllm_mask_token)
        self.traces: dict[int, Trace] = {}

    def make_sequence(self, seq_id: int, session: Any, **options: Any) -> TracedSequence:
        sequence = TracedSequence(seq_id=seq_id, session=session, **options)
        sequence.trace = self.traces[session.session_id] = Trace()
        return sequence

    def update_running(self, running: list[TracedSequence], batched_outputs: Any, *others: Any, **options: Any) -> None:
        scores = batched_outputs.extra_outputs.logprobs.view(len(running), -1).numpy()
        for sequence, logprobs in zip(running, scores, strict=True):
            sequence.logprobs = logprobs
        super().update_running(running, batched_outputs, *others, **options)


class LmdeploySampler:
    """Samples with a running `engine`, which holds the weights of `lm`; see `start_engine`."""

    def __init__(self, lm: DiffusionLM, engine: Engine) -> None:
        self.lm, self.engine = lm, engine
        self.agent = engine.executor.model_agent
        self.strategy = Agent(engine.misc_config.dllm_config, lm)
        self.sequences = TracedSequences(lm.block_size, lm.mask_token_id)
        self.agent.agent_strategy = engine.model_agent_strategy = self.strategy
        self.agent.async_sampling_logits = self.strategy.sample
        engine.sampling_strategy = engine.seq_meta.sampling_strategy = Keys(lm.pad_token_id, lm.block_size)
        engine.seq_strategy = engine.seq_meta.strategy = self.sequences
        self.loop = asyncio.new_event_loop()
        Thread(target=run_on, args=(lm.device, self.loop), daemon=True).start()
        self.loop.call_soon_threadsafe(engine.start)
        finalize(self, shut, engine, self.loop).atexit = False
        self.instance = engine.create_instance()
        self.sessions = count(1)
        self.weights_version = 0
        self.asleep = False

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """See `Sampler.sample`."""
        return collect_samples(self.stream(prompts, n, decoding), len(prompts), n)

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        decoding: Decoding,
        first: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, int, Trajectory]]:
        """See `Sampler.stream`. Raises DirlError for what LMDeploy cannot do."""
        check(prompts, decoding, self.lm, watch)
        self.strategy.decoding = decoding
        wanted = make_requests(prompts, n, decoding, first, seeds)
        finished: queue.SimpleQueue[tuple[Request, Trajectory | BaseException]] = queue.SimpleQueue()

        async def ask(request: Request, session: int) -> None:
            try:
                finished.put((request, await self._answer(request, session, decoding)))
            except BaseException as error:  # raised again where the stream is read
                finished.put((request, error))

        asked = [asyncio.run_coroutine_threadsafe(ask(request, next(self.sessions)), self.loop) for request in wanted]
        try:
            for _ in wanted:
                request, answer = finished.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield request.prompt, request.sample, answer
        finally:
            for future in asked:
                future.cancel()

    async def _answer(self, request: Request, session: int, decoding: Decoding) -> Trajectory:
        options = generation(request, decoding, self.lm)
        try:
            async for output in self.instance.async_stream_infer(session, request.prompt_ids, options):
                status = output.status
        finally:
            trace = self.sequences.traces.pop(session, None)
        if status != ResponseType.FINISH or trace is None:
            raise DirlError(f"LMDeploy gave a request up ({status.name}): lower rollout.max_batch or its cache_share")
        stopped = not set(decoding.stop_token_ids).isdisjoint(trace.token_ids)
        return Trajectory(
            prompt_ids=request.prompt_ids,
            token_ids=trace.token_ids,
            reveal_step=trace.reveal_step,
            logprobs=trace.logprobs,
            stop_reason="stop" if stopped else "length",
            denoise_forwards=trace.denoise_forwards,
            forwards=trace.forwards,
            weights_version=self.weights_version,
            stop_token_ids=decoding.stop_token_ids,
            block_size=self.lm.block_size,
        )

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the tensors into the engine's own, on the device and cast to its dtype. No stream may be open."""
        if self.asleep and not self._has_weights():
            self.engine.wakeup(["weights"])
        model = self.agent.patched_model.get_model()
        with self.agent.all_context():
            model.load_weights(published_weights(self.lm.model, named_tensors))
            process_weights_after_loading(model)
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)  # the engine reads them on a CUDA stream of its own
        self.weights_version = version

    def sleep(self) -> None:
        """Move the weights to the CPU and free keys and values."""
        self._wait_for(self.engine.sleep(level=1))
        self.asleep = True

    def wake(self) -> None:
        """Take the memory again."""
        if self.asleep:
            self._wait_for(self._wakeup(["kv_cache"] if self._has_weights() else None))
            self.asleep = False

    def _has_weights(self) -> bool:
        return next(self.agent.patched_model.get_model().parameters()).device == self.lm.device

    async def _wakeup(self, tags: list[str] | None) -> None:
        self.engine.wakeup(tags)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done by the thread of the engine's loop."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result()


def run_on(device: torch.device, loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop in this thread and on this device: a thread begins on the first GPU, whichever its process is on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loop.run_forever()


def shut(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    """Have an engine give back all that it holds: nobody samples with it any more, as after a job of a sweep."""

    async def leave() -> None:
        await engine.sleep(level=2)
        loop.stop()

    asyncio.run_coroutine_threadsafe(leave(), loop)


def start_engine(lm: DiffusionLM, directory: str, max_batch: int, cache_share: float) -> Engine:
    """LMDeploy on the checkpoint in `directory`, in this process and on its current GPU.

    cache_share: of the memory that is free once the weights are there, for keys and values.
    """
    options = PytorchEngineConfig(
        dtype="bfloat16",
        session_len=lm.longest_prompt + 1 + lm.block_size,
        max_batch_size=max_batch,
        cache_max_entry_count=cache_share,
        enable_prefix_caching=False,  # it would outlive a change of the weights
        dllm_block_length=lm.block_size,
        dllm_denoising_steps=lm.block_size,  # None crashes some of its strategies, of which none is used
    )
    logging.getLogger("lmdeploy").setLevel(logging.WARNING)  # it tells hundreds of things otherwise
    envs.enable_check_env = False  # it starts a process, which a script without a `__main__` guard does not survive
    with masking_with(lm.mask_token_id):
        return Engine.from_pretrained(directory, options)


def generation(request: Request, decoding: Decoding, lm: DiffusionLM) -> GenerationConfig:
    """What LMDeploy itself has to know of a request, its room cut to what the model has positions for."""
    return GenerationConfig(
        max_new_tokens=min(decoding.max_new_tokens, lm.longest_prompt + 1 - len(request.prompt_ids)),
        stop_token_ids=list(decoding.stop_token_ids),
        random_seed=request.key,
    )


def check(prompts: Sequence[list[int]], decoding: Decoding, lm: DiffusionLM, watch: Watch | None) -> None:
    if watch:
        raise DirlError("watch=true wants rollout=native: LMDeploy does not show a block before it is full")
    if decoding.block_size not in (None, lm.block_size):
        raise DirlError(
            f"decoding.block_size is {decoding.block_size} and the model's is {lm.block_size}: leave it out"
        )
    if (longest := max(map(len, prompts), default=0)) > lm.longest_prompt:
        raise DirlError(f"a prompt has {longest} tokens and the model has room for {lm.longest_prompt}: shorten it")


@contextmanager
def masking_with(mask_token_id: int) -> Iterator[None]:
    """LMDeploy writes the published mask token into the configuration of every SDAR; another may be meant."""
    published = SDARModelConfigBuilder.__dict__["build"]

    def build(cls: type, hf_config: Any, model_path: str | None = None, **options: Any) -> Any:
        config = published.__func__(cls, hf_config, model_path, **options)
        config.dllm_mask_token = mask_token_id
        return config

    SDARModelConfigBuilder.build = classmethod(build)
    try:
        yield
    finally:
        SDARModelConfigBuilder.build = published
