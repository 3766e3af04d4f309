"""LMDeploy's PyTorch engine, the released package, giving the trajectories that it does not keep.

Two of its strategies are subclassed: the agent's, in which this toolkit decides what is revealed and scores it, and the
sequence's, which writes down when that was. Tokens are drawn by LMDeploy, from a seed of each request's own.
"""

import asyncio
import queue
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Thread
from typing import Any

import numpy as np
import torch
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType
from lmdeploy.pytorch.configurations.sdar import SDARModelConfigBuilder
from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
from lmdeploy.pytorch.engine import Engine
from lmdeploy.pytorch.strategies.dllm.model_agent import DLLMExtraInputs, DLLMExtraOutputs, DLLMModelAgentStrategy
from lmdeploy.pytorch.strategies.dllm.sequence import DLLMSequenceStrategy, SchedulerSequenceDLLM
from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading
from torch import Tensor

from dirl_cli.diffusion.sampling import candidates, truncated
from dirl_cli.diffusion.unmasking import State, find_strategy, reveal
from dirl_cli.errors import DirlError
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.rollout.native import Request, requests
from dirl_cli.rollout.sampler import Watch
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


class Agent(DLLMModelAgentStrategy):
    """Reveals by this toolkit's strategies. `decoding` is that of the requests in flight."""

    decoding = Decoding()

    def post_sampling(
        self, inputs: Any, logits: Tensor, next_token_ids: Tensor, extra_inputs: DLLMExtraInputs
    ) -> tuple[Tensor, ScoredInputs]:
        """The last blocks' tokens with the drawn ones in masked places, their states and log-probs.

        logits: (sequences x B, V), at temperature and without unsampled ids. next_token_ids: drawn from them.
        """
        options = self.decoding
        given = self.slice_outputs(inputs.input_ids.flatten(), inputs.seq_length)
        states = extra_inputs.dllm_mask.view(-1, self.block_size)
        written = (states == DLLM_UNMASKED).all(1, keepdim=True)  # this forward cached their keys and values
        states = states.masked_fill(written, DLLM_CACHED)
        masked = states == DLLM_MASKED
        full = logits[masked.flatten()].float().log_softmax(-1)
        kept = truncated(full, options.top_k, options.top_p) if options.temperature else full
        drawn = candidates(full, kept, next_token_ids[masked.flatten()], options.confidence)
        owed = torch.full_like(masked[:, 0], self.block_size // options.denoising_steps, dtype=torch.long)
        chosen = reveal(find_strategy(options.strategy), State(masked, drawn, owed.clamp(min=1), options.threshold))
        states = states.masked_fill(chosen, DLLM_UNMASKED)
        logprobs = torch.zeros_like(given, dtype=torch.float).masked_scatter(masked.flatten(), drawn.logprobs)
        return torch.where(masked.flatten(), next_token_ids, given), ScoredInputs(states.flatten(), logprobs)

    def make_extra_outputs(self, extra_inputs: ScoredInputs) -> ScoredOutputs:
        return ScoredOutputs(extra_inputs.dllm_mask, extra_inputs.logprobs)


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
        self.strategy = Agent(engine.misc_config.dllm_config, lm.mask_token_id)
        self.sequences = TracedSequences(lm.block_size, lm.mask_token_id)
        self.agent.agent_strategy = engine.model_agent_strategy = self.strategy
        engine.seq_strategy = engine.seq_meta.strategy = self.sequences
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.loop.call_soon_threadsafe(engine.start)
        self.instance = engine.create_instance()
        self.sessions = count(1)
        self.weights_version = 0
        self.asleep = False

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """See `Sampler.sample`."""
        found = {(prompt, sample): trajectory for prompt, sample, trajectory in self.stream(prompts, n, decoding)}
        return [[found[prompt, sample] for sample in range(n)] for prompt in range(len(prompts))]

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
        check(decoding, self.lm, watch)
        self.strategy.decoding = decoding
        wanted = requests(prompts, n, decoding, first, seeds)
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
        async for output in self.instance.async_stream_infer(session, request.prompt_ids, options):
            status = output.status
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
        )

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the tensors into the engine's own, on the device and cast to its dtype. No stream may be open."""
        if self.asleep:
            self.engine.wakeup(["weights"])
        model = self.agent.patched_model.get_model()
        with self.agent.all_context():
            model.load_weights((name, tensor.detach()) for name, tensor in named_tensors)
            process_weights_after_loading(model)
        self.weights_version = version

    def sleep(self) -> None:
        """Move the weights to the CPU and free keys and values."""
        asyncio.run_coroutine_threadsafe(self.engine.sleep(level=1), self.loop).result()
        self.asleep = True

    def wake(self) -> None:
        """Take the memory again."""
        if self.asleep:
            weights_are_back = next(self.agent.patched_model.get_model().parameters()).is_cuda
            self.engine.wakeup(["kv_cache"] if weights_are_back else None)
            self.asleep = False


def start_engine(lm: DiffusionLM, directory: str, max_batch: int, cache_share: float) -> Engine:
    """LMDeploy on the checkpoint in `directory`, in this process and on this GPU.

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
    with masking_with(lm.mask_token_id):
        return Engine.from_pretrained(directory, options)


def generation(request: Request, decoding: Decoding, lm: DiffusionLM) -> GenerationConfig:
    """A request's options, its room cut to what the model has positions for."""
    greedy = decoding.temperature == 0
    return GenerationConfig(
        do_sample=not greedy,
        temperature=1.0 if greedy else decoding.temperature,
        top_k=1 if greedy else decoding.top_k,
        top_p=decoding.top_p,
        max_new_tokens=min(decoding.max_new_tokens, lm.longest_prompt + 1 - len(request.prompt_ids)),
        stop_token_ids=list(decoding.stop_token_ids),
        bad_token_ids=list(lm.unsampled_ids),
        random_seed=request.key,
    )


def check(decoding: Decoding, lm: DiffusionLM, watch: Watch | None) -> None:
    if watch:
        raise DirlError("watch=true wants rollout=native: LMDeploy does not show a block before it is full")
    if decoding.block_size not in (None, lm.block_size):
        raise DirlError(
            f"decoding.block_size is {decoding.block_size} and the model's is {lm.block_size}: leave it out"
        )
    if decoding.denoising_steps < lm.block_size and lm.block_size % decoding.denoising_steps:
        raise DirlError(
            f"rollout=lmdeploy wants a number of denoising steps that divides the block of {lm.block_size},"
            f" not {decoding.denoising_steps}: change decoding.denoising_steps, or take rollout=native"
        )


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
