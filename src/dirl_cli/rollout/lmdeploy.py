"""LMDeploy's PyTorch engine, the released package, as a `Sampler`.

It runs with the strategies of `lmdeploy_strategies.py`, which give the trajectories that it does not keep. The engine
lives in this process and on the GPU of its model, so that each process of a run has one of its own.
"""

import asyncio
import logging
import queue
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from threading import Thread
from typing import Any
from weakref import finalize

import torch
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, ResponseType
from lmdeploy.pytorch import envs
from lmdeploy.pytorch.configurations.sdar import SDARModelConfigBuilder
from lmdeploy.pytorch.engine import Engine
from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading
from torch import Tensor

from dirl_cli.diffusion.sampling import request_key
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.save import published_weights
from dirl_cli.rollout.engines import require_forgetful
from dirl_cli.rollout.lmdeploy_strategies import KeyedSampling, RequestTrace, TracedSequences, UnmaskingAgent
from dirl_cli.rollout.requests import Request, make_requests, rule_of
from dirl_cli.rollout.sampler import GivenUp, Hint, NewBlock, Stint, Watch, collect_samples, cut_to
from dirl_cli.types import Decoding, StopReason, Trajectory

PATIENCE = 0.02  # seconds that a step of a live batch waits for news, in which newcomers wait too


class LmdeploySampler:
    """Samples with a running `engine`, which holds the weights of `lm`; see `start_engine`."""

    def __init__(self, lm: DiffusionLM, engine: Engine) -> None:
        self.lm = lm
        self.engine = engine
        self.agent = engine.executor.model_agent
        self.strategy = UnmaskingAgent(engine.misc_config.dllm_config, lm)
        self.sequences = TracedSequences(lm.block_size, lm.mask_token_id)

        # LMDeploy chooses its strategies by the kind of model and has no setting for others: they are put in here.
        self.agent.agent_strategy = engine.model_agent_strategy = self.strategy
        self.agent.async_sampling_logits = self.strategy.sample
        engine.sampling_strategy = engine.seq_meta.sampling_strategy = KeyedSampling(lm.pad_token_id, lm.block_size)
        engine.seq_strategy = engine.seq_meta.strategy = self.sequences

        # The engine is asynchronous: it runs in a thread with an event loop, which streams hand their requests to.
        self.loop = asyncio.new_event_loop()
        Thread(target=run_loop_on, args=(lm.device, self.loop), daemon=True).start()
        self.loop.call_soon_threadsafe(engine.start)
        finalize(self, shut_down, engine, self.loop).atexit = False
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
        hints: Sequence[Sequence[Hint]] | None = None,
        stint: Stint | None = None,
    ) -> Iterator[tuple[int, int, Trajectory]]:
        """See `Sampler.stream`. Raises DirlError for what LMDeploy cannot do."""
        check_prompts(prompts, decoding, self.lm, watch)
        if stint and stint.waited_for < len(prompts):
            raise DirlError("LMDeploy ends every answer that it begins: give rollout=native, or rl.async_rollout=1")
        if hints:
            raise DirlError("hints want rollout=native: LMDeploy begins every answer with nothing but masked tokens")
        self.strategy.decoding = decoding
        requests = make_requests(prompts, n, decoding, first, seeds)
        finished: queue.SimpleQueue[tuple[Request, Trajectory | BaseException]] = queue.SimpleQueue()

        async def answer(request: Request, session: int) -> None:
            try:
                finished.put((request, await self.answer(request, session)))
            except BaseException as error:  # raised again where the stream is read
                finished.put((request, error))

        futures = []
        for request in requests:
            futures.append(asyncio.run_coroutine_threadsafe(answer(request, next(self.sessions)), self.loop))
        try:
            for _ in requests:
                request, outcome = finished.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield request.prompt, request.sample, outcome
        finally:
            # A reader that stops early, or an error, leaves nothing running.
            for future in futures:
                future.cancel()

    async def answer(
        self, request: Request, session: int, show: Callable[[RequestTrace], None] | None = None
    ) -> Trajectory:
        """Sample one request, in the thread of the engine's loop.

        session: LMDeploy's number for it, by which its trace is found. show: called with that whenever it may have
        grown.
        """
        decoding = request.decoding
        options = generation_config(request, decoding, self.lm)
        try:
            async for output in self.instance.async_stream_infer(session, request.prompt_ids, options):
                status = output.status
                if show and session in self.sequences.traces:
                    show(self.sequences.traces[session])
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

    def open_batch(self, length: int) -> "LmdeployBatch":
        """See `Sampler.open_batch`."""
        return LmdeployBatch(self, self.engine.scheduler_config.max_batches, length)

    def set_block_size(self, block_size: int) -> None:
        """See `Sampler.set_block_size`. Raises DirlError for another size than the engine was started with."""
        if block_size != self.lm.block_size:
            raise DirlError("LMDeploy samples in blocks of one size: give rollout=native where they grow")

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the tensors into the engine's own, on the device and cast to its dtype. No stream may be open."""
        # Weights that `sleep` moved to the CPU are brought back before they are written to.
        if self.asleep and not self._has_weights():
            self.engine.wakeup(["weights"])
        model = self.agent.patched_model.get_model()
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        with self.agent.all_context():
            model.load_weights(published_weights(self.lm.model, named_tensors))
            process_weights_after_loading(model)

        # That may lay experts out anew, elsewhere, and a captured graph reads where they were.
        if [parameter.data_ptr() for parameter in model.parameters()] != addresses:
            self.agent.reset_graph_runner()
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)  # the engine reads them on a CUDA stream of its own
        self.weights_version = version

    def sleep(self) -> None:
        """Move the weights to the CPU and free the KV cache."""
        self._wait_for(self.engine.sleep(level=1))
        self.asleep = True

    def wake(self) -> None:
        """Allocate the KV cache again, and the weights where `update_weights` has not."""
        if self.asleep:
            self._wait_for(self._wakeup(["kv_cache"] if self._has_weights() else None))
            self.asleep = False

    def _has_weights(self) -> bool:
        return next(self.agent.patched_model.get_model().parameters()).device == self.lm.device

    async def _wakeup(self, tags: list[str] | None) -> None:
        self.engine.wakeup(tags)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the thread of the engine's loop and wait until it is done."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result()


class LmdeployBatch:
    """See `LiveBatch`. All that is under way is decoded by one rule: others wait until there is none of it."""

    def __init__(self, sampler: LmdeploySampler, slots: int, length: int) -> None:
        self.sampler = sampler
        self.slots = slots
        self.length = length
        self.running: dict[tuple[int, int], Future[None]] = {}  # by prompt and sample
        self.news: queue.SimpleQueue[NewBlock | GivenUp] = queue.SimpleQueue()

    def has_room(self, decoding: Decoding) -> bool:
        """See `LiveBatch.has_room`."""
        if not self.running:
            return True
        return len(self.running) < self.slots and rule_of(decoding) == rule_of(self.sampler.strategy.decoding)

    def add(
        self, prompt: int, sample: int, prompt_ids: list[int], decoding: Decoding, answer_ids: Sequence[int] = ()
    ) -> None:
        """See `LiveBatch.add`. An answer that has blocks already is given up."""
        if answer_ids:
            self.running[prompt, sample] = Future()
            self.news.put(GivenUp(prompt, sample, "LMDeploy goes on with no answer: start dirl serve rollout=native"))
            return
        decoding = cut_to(decoding, prompt_ids, self.length)
        self.sampler.strategy.decoding = decoding
        request = Request(prompt, sample, prompt_ids, decoding, request_key(decoding.seed, prompt_ids, sample))
        answer = self._answer(request, next(self.sampler.sessions))
        self.running[prompt, sample] = asyncio.run_coroutine_threadsafe(answer, self.sampler.loop)

    async def _answer(self, request: Request, session: int) -> None:
        """Sample one request and tell its blocks, in the thread of the engine's loop."""
        shown = 0  # tokens

        def tell(trace: RequestTrace | Trajectory, stop_reason: StopReason | None = None) -> None:
            nonlocal shown
            part = slice(shown, len(trace.token_ids))
            shown = len(trace.token_ids)
            self.news.put(
                NewBlock(
                    prompt=request.prompt,
                    sample=request.sample,
                    token_ids=trace.token_ids[part],
                    reveal_step=trace.reveal_step[part],
                    logprobs=trace.logprobs[part],
                    denoise_forwards=trace.denoise_forwards,
                    forwards=trace.forwards,
                    weights_version=self.sampler.weights_version,
                    stop_reason=stop_reason,
                )
            )

        def show(trace: RequestTrace) -> None:
            if len(trace.token_ids) > shown:
                tell(trace)

        try:
            trajectory = await self.sampler.answer(request, session, show)
        except DirlError as error:
            self.news.put(GivenUp(request.prompt, request.sample, str(error)))
        else:
            tell(trajectory, trajectory.stop_reason)

    def remove(self, prompt: int, sample: int) -> None:
        """See `LiveBatch.remove`."""
        future = self.running.pop((prompt, sample), None)
        if future:
            future.cancel()

    def step(self) -> list[NewBlock | GivenUp]:
        """See `LiveBatch.step`. Raises what ended the engine."""
        news = []
        try:
            news.append(self.news.get(timeout=PATIENCE))
            while True:
                news.append(self.news.get_nowait())
        except queue.Empty:
            pass

        # An error that is no sentence is no answer's, and is found in its future.
        for future in list(self.running.values()):
            if future.done():
                future.result()
        told = [one for one in news if (one.prompt, one.sample) in self.running]
        for one in told:
            if isinstance(one, GivenUp) or one.stop_reason:
                del self.running[one.prompt, one.sample]
        return told

    def close(self) -> None:
        """See `LiveBatch.close`."""
        for prompt, sample in list(self.running):
            self.remove(prompt, sample)


def run_loop_on(device: torch.device, loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop in this thread and on this device: a thread begins on the first GPU, whichever its process is on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    loop.run_forever()


def shut_down(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    """Free all that an engine holds, once nobody samples with it any more, as after a job of a sweep."""

    async def stop() -> None:
        await engine.sleep(level=2)
        loop.stop()

    asyncio.run_coroutine_threadsafe(stop(), loop)


def start_engine(lm: DiffusionLM, directory: str, max_batch: int, cache_share: float) -> Engine:
    """Start LMDeploy on the checkpoint in `directory`, in this process and on its current GPU.

    max_batch: sequences at once. cache_share: the fraction of the memory that the weights leave free which the KV cache
    takes.
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
    logging.getLogger("lmdeploy").setLevel(logging.WARNING)  # it prints hundreds of lines otherwise
    envs.enable_check_env = False  # it starts a process, which a script without a `__main__` guard does not survive
    with mask_token(lm.mask_token_id):
        return Engine.from_pretrained(directory, options)


def generation_config(request: Request, decoding: Decoding, lm: DiffusionLM) -> GenerationConfig:
    """LMDeploy's own settings of a request, its new tokens cut to the positions that the model has."""
    return GenerationConfig(
        max_new_tokens=min(decoding.max_new_tokens, lm.longest_prompt + 1 - len(request.prompt_ids)),
        stop_token_ids=list(decoding.stop_token_ids),
        random_seed=request.key,
    )


def check_prompts(prompts: Sequence[list[int]], decoding: Decoding, lm: DiffusionLM, watch: Watch | None) -> None:
    """Raises DirlError for what LMDeploy cannot do.

    That is a watched stream, some strategies, another block size, a prompt that is too long.
    """
    require_forgetful(decoding)
    if watch:
        raise DirlError("watch=true wants rollout=native: LMDeploy does not show a block before it is full")
    if decoding.block_size not in (None, lm.block_size):
        raise DirlError(
            f"decoding.block_size is {decoding.block_size} and the model's is {lm.block_size}: leave it out"
        )
    longest = max(map(len, prompts), default=0)
    if longest > lm.longest_prompt:
        raise DirlError(f"a prompt has {longest} tokens and the model has room for {lm.longest_prompt}: shorten it")


@contextmanager
def mask_token(mask_token_id: int) -> Iterator[None]:
    """Let LMDeploy build configurations with this mask token: it writes the published one into that of every SDAR."""
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
