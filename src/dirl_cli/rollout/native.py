"""The engine that runs anywhere: batched, continuous, KV-cached block decoding on any transformers decoder.

One forward commits what a sequence has finished (at first the prompt's whole blocks, then each block) and denoises
its next block, so caching costs no forward of its own. Sequences join and leave at block boundaries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dirl_cli.diffusion.sampling import request_key
from dirl_cli.errors import DirlError
from dirl_cli.models.kv_cache import bytes_per_token
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.low_precision import cast_linear_weights, recast
from dirl_cli.rollout.decoder import Decoder, decoder_of
from dirl_cli.rollout.forward import EagerForward, Forward
from dirl_cli.rollout.forward_gpu import GraphCache, GraphForward, block_attention, page_size, run_eagerly
from dirl_cli.rollout.products import Products
from dirl_cli.rollout.requests import Request, make_requests, require_free_end
from dirl_cli.rollout.sampler import GivenUp, Hint, NewBlock, Stint, Watch, collect_samples, continued, cut_to
from dirl_cli.rollout.scheduler import Finished, FullBlock, Scheduler
from dirl_cli.types import Decoding, Trajectory


class NativeSampler:
    """Samples from `lm` with at most `max_batch` sequences at once.

    by_blocks: forwards as on a GPU (`GraphForward`), where that is the default. own_weights: nobody else uses those of
    `lm`, so that they are not kept while it sleeps. products: what it multiplies with on a CPU. cache_share: of the
    memory that is free on a GPU when the first answer begins, the part for keys and values; what all of `max_batch`
    could need at most is enough. Where it is less, fewer are sampled at once, as long as they are long.
    record_entropy: whether trajectories have `entropies`.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        max_batch: int = 64,
        by_blocks: bool | None = None,
        own_weights: bool = False,
        products: Products = "auto",
        cache_share: float = 0.8,
        record_entropy: bool = False,
    ) -> None:
        if max_batch < 1:
            raise DirlError("max_batch must be at least 1")
        self.lm = lm
        self.own_weights = own_weights
        self.max_batch = max_batch
        self.weights_version = 0
        self.by_blocks = lm.device.type == "cuda" if by_blocks is None else by_blocks
        self.idle_forward: GraphForward | None = None  # with its graphs, from one stream to the next
        self.products = products
        self.cache_share = cache_share
        self.record_entropy = record_entropy
        self.emptied: list[tuple[torch.UntypedStorage, int]] = []  # while it sleeps, with their bytes
        self.decoder: Decoder | None = None  # with weights that it reordered, from one stream to the next
        self.low_precision_model: PreTrainedModel | None = None

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """See `Sampler.sample`."""
        return collect_samples(self.stream(prompts, n, decoding), len(prompts), n)

    @torch.inference_mode()
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
        """See `Sampler.stream`."""
        block_size = self._block_size(decoding)
        stint = stint or Stint(len(prompts))
        requests = unfinished(make_requests(prompts, n, decoding, first, seeds, hints), stint)
        remaining = stint.begin((request.prompt, request.sample) for request in requests)
        if not requests or remaining.is_over:
            return
        queue = list(reversed(requests))
        longest = max(len(request.prompt_ids) for request in queue)
        if longest > self.lm.longest_prompt:
            raise DirlError(
                f"a prompt has {longest} tokens and the model has room for {self.lm.longest_prompt}: shorten it"
            )
        for request in queue:
            self.require_start(request.prompt_ids)
            room = self.lm.longest_prompt + 1 - len(request.prompt_ids)
            require_free_end(request.hint, min(decoding.max_new_tokens, room), decoding.stop_token_ids)

        # The slots are as long as the longest answer may become, and no more of them than there are answers.
        end = min(longest + decoding.max_new_tokens, self.lm.longest_prompt + 1)
        length = -(-end // block_size) * block_size  # whole blocks
        slots = min(self.max_batch, len(queue))
        forward = self.forward_of(slots, length)

        # Continuous batching: a slot that falls free takes the next request before the next forward.
        scheduler = Scheduler(forward, slots)
        while not remaining.is_over and (queue or scheduler.running):
            while queue and scheduler.free:
                scheduler.add(queue.pop())
            for finished in list(scheduler.step(watch)):
                prompt, sample = finished.request.prompt, finished.request.sample
                remaining.take(prompt, sample)
                yield prompt, sample, continued(stint.under_way.pop((prompt, sample), None), self._trajectory(finished))

        # What is left under way is kept up to its last full block: the tokens of the next one are drawn anew.
        for part in scheduler.under_way():
            key = part.request.prompt, part.request.sample
            stint.under_way[key] = continued(stint.under_way.get(key), self._trajectory(part))
        self.keep_idle(forward)

    def open_batch(self, length: int) -> "NativeBatch":
        """See `Sampler.open_batch`."""
        slots = self.max_batch
        if self.lm.device.type == "cpu":  # on a GPU there are fewer pages, and as many slots
            slots = min(slots, slots_on_cpu(self.lm, length, self.cache_share))
        return NativeBatch(self, slots, length)

    def set_block_size(self, block_size: int) -> None:
        """See `Sampler.set_block_size`."""
        self.lm = replace(self.lm, block_size=block_size)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy into the model what does not already share its storage; every later trajectory carries `version`."""
        own = self.lm.model.state_dict(keep_vars=True)

        # Where the model is also the one that is trained, its tensors are these and there is nothing to copy. Copying
        # is in place: graphs read the addresses that they were captured with.
        with torch.no_grad():
            for name, tensor in named_tensors:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        if self.low_precision_model:
            recast(self.low_precision_model, self.lm.model)
        if self.decoder:
            self.decoder.renew()
        self.weights_version = version

    def sleep(self) -> None:
        """Free own weights, and what the next stream makes anew: KV cache, graphs, weights cast or reordered."""
        self.idle_forward = None
        self.decoder = None
        self.low_precision_model = None

        # Emptying the storage keeps the parameter objects, and so the names and shapes that `wake` allocates again.
        if self.own_weights:
            self.emptied = storages(self.lm.model)
            for storage, _ in self.emptied:
                storage.resize_(0)
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Allocate own weights again, which `update_weights` has to fill."""
        if self.own_weights:
            for storage, size in self.emptied:
                storage.resize_(size)
            self.emptied = []

    def _decoder(self, model: PreTrainedModel) -> Decoder:
        """The forward of the model, which that of an earlier stream is too unless the model is another."""
        if self.decoder is None or self.decoder.model is not model:
            self.decoder = decoder_of(model, self.products)
        return self.decoder

    def _graph_forward(self, lm: DiffusionLM, decoder: Decoder, slots: int, length: int) -> GraphForward:
        """The forward of an earlier stream if it has room for these slots, else a new one."""
        idle = self.idle_forward
        self.idle_forward = None  # not for two streams at once
        fits = idle and slots <= idle.slots and length <= idle.length
        if idle and fits and idle.decoder is decoder and idle.lm.block_size == lm.block_size:
            return idle
        del idle  # its memory has to be free before there is another
        pages = self._pages(lm, slots, length)
        if lm.device.type != "cuda":
            return GraphForward(lm, decoder, slots, length, block_attention, run_eagerly, pages, self.record_entropy)
        from dirl_cli.rollout.attention_triton import decode_attention  # which only a GPU has the package for

        torch.cuda.set_device(lm.device)  # on which Triton starts
        return GraphForward(lm, decoder, slots, length, decode_attention, GraphCache(), pages, self.record_entropy)

    def _pages(self, lm: DiffusionLM, slots: int, length: int) -> int:
        """The pages of the KV cache: those that all slots may take, or as many as there is memory for.

        Raises DirlError where it is too little for one answer.
        """
        size = page_size(lm.block_size)
        longest = -(-length // size)
        free = free_bytes(lm.device)
        if free is None:
            return slots * longest

        device = lm.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.model.dtype
        of_page = size * bytes_per_token(lm.model.config, dtype)
        pages = int(self.cache_share * free) // of_page - 1  # one is to spare
        if pages < longest:
            raise DirlError(
                f"keys and values of an answer of {length:,} tokens take {longest * of_page / 1e9:.2f} GB and"
                f" rollout.cache_share={self.cache_share:g} of what is free is {self.cache_share * free / 1e9:.2f} GB:"
                " lower decoding.max_new_tokens or raise rollout.cache_share"
            )
        return min(pages, slots * longest)

    def _model(self) -> PreTrainedModel:
        """The model, its linear layers in autocast's dtype: a graph would cast them again in every forward."""
        model = self.lm.model
        device = self.lm.device.type
        if not torch.is_autocast_enabled(device) or model.dtype == torch.get_autocast_dtype(device):
            return model
        if self.low_precision_model is None:
            self.low_precision_model = cast_linear_weights(model, torch.get_autocast_dtype(device))
        return self.low_precision_model

    def _block_size(self, decoding: Decoding) -> int:
        if decoding.block_size not in (None, self.lm.block_size):
            raise DirlError(
                f"decoding.block_size is {decoding.block_size} and the model's is {self.lm.block_size}:"
                " leave decoding.block_size out"
            )
        return self.lm.block_size

    def require_start(self, prompt_ids: list[int]) -> None:
        """Raises DirlError for an empty prompt where a token is predicted by the one before it: it has no first."""
        if self.lm.logit_shift and not prompt_ids:
            raise DirlError(
                "a prompt holds no token, and this model predicts each from the one before it: give at least one"
            )

    def keep_idle(self, forward: Forward) -> None:
        """Take back a forward that nothing uses any more: the next stream goes on with its graphs."""
        self.idle_forward = forward if isinstance(forward, GraphForward) else None

    def forward_of(self, slots: int, length: int) -> Forward:
        """The forwards of so many slots, each with room for `length` tokens."""
        lm = replace(self.lm, model=self._model())
        decoder = self._decoder(lm.model)
        if self.by_blocks:
            return self._graph_forward(lm, decoder, slots, length)
        return EagerForward(lm, decoder, slots, length, record_entropy=self.record_entropy)

    def _trajectory(self, finished: Finished) -> Trajectory:
        return Trajectory(
            prompt_ids=finished.request.prompt_ids,
            token_ids=finished.part.token_ids,
            reveal_step=finished.part.reveal_step,
            logprobs=finished.part.logprobs,
            entropies=finished.part.entropies,
            stop_reason="stop" if finished.stopped else "length",
            denoise_forwards=finished.forwards,
            forwards=finished.forwards,  # commits ride on denoising forwards
            weights_version=self.weights_version,
            stop_token_ids=finished.request.decoding.stop_token_ids,
            block_size=self.lm.block_size,
        )


def unfinished(requests: Sequence[Request], stint: Stint) -> list[Request]:
    """The requests that have not ended yet, each with what there is of its answer."""
    left = []
    for request in requests:
        key = request.prompt, request.sample
        if key in stint.under_way:
            left.append(replace(request, answer_ids=stint.under_way[key].token_ids))
        elif key not in stint.finished:
            left.append(request)
    return left


def storages(model: PreTrainedModel) -> list[tuple[torch.UntypedStorage, int]]:
    """The storages of a model's parameters with their bytes, each once, though several parameters may share one."""
    by_address = {}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        by_address[storage.data_ptr()] = storage, storage.nbytes()
    return list(by_address.values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for a CPU, whose pages are as long as a sequence and there from the start."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


class NativeBatch:
    """See `LiveBatch`. While it is open, nothing else is sampled with its sampler."""

    def __init__(self, sampler: NativeSampler, slots: int, length: int) -> None:
        self.sampler = sampler
        self.slots = slots
        self.length = length
        self.full_blocks: list[FullBlock] = []  # of the last forward
        with torch.inference_mode():
            self.forward = sampler.forward_of(slots, length)
            self.scheduler = Scheduler(self.forward, slots, self.full_blocks.append)

    def has_room(self, decoding: Decoding) -> bool:
        """See `LiveBatch.has_room`."""
        return bool(self.scheduler.free)

    def add(
        self, prompt: int, sample: int, prompt_ids: list[int], decoding: Decoding, answer_ids: Sequence[int] = ()
    ) -> None:
        """See `LiveBatch.add`."""
        self.sampler.require_start(prompt_ids)
        key = request_key(decoding.seed, prompt_ids, sample)
        decoding = cut_to(decoding, prompt_ids, self.length)
        self.scheduler.add(Request(prompt, sample, prompt_ids, decoding, key, answer_ids=answer_ids))

    def remove(self, prompt: int, sample: int) -> None:
        """See `LiveBatch.remove`."""
        for slot, request in self.scheduler.running.items():
            if (request.prompt, request.sample) == (prompt, sample):
                self.scheduler.remove(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[NewBlock | GivenUp]:
        """See `LiveBatch.step`."""
        list(self.scheduler.step())  # which shows full blocks, and yields nothing besides
        news: list[NewBlock | GivenUp] = []
        for block in self.full_blocks:
            request = block.request
            news.append(
                NewBlock(
                    prompt=request.prompt,
                    sample=request.sample,
                    token_ids=block.part.token_ids,
                    reveal_step=block.part.reveal_step,
                    logprobs=block.part.logprobs,
                    denoise_forwards=block.forwards,
                    forwards=block.forwards,
                    weights_version=self.sampler.weights_version,
                    stop_reason=block.stop_reason,
                )
            )
        self.full_blocks.clear()
        return news

    def close(self) -> None:
        """See `LiveBatch.close`."""
        self.sampler.keep_idle(self.forward)
        del self.forward, self.scheduler  # and with them keys and values, whoever still has this batch


def slots_on_cpu(lm: DiffusionLM, length: int, share: float) -> int:
    """How many answers of `length` tokens a share of the memory that is available has room for, on a CPU.

    Raises DirlError where it has none for one.
    """
    of_answer = length * bytes_per_token(lm.model.config, lm.model.dtype)
    available = psutil.virtual_memory().available
    slots = int(share * available) // of_answer
    if not slots:
        raise DirlError(
            f"keys and values of an answer of {length:,} tokens take {of_answer / 1e9:.2f} GB and"
            f" rollout.cache_share={share:g} of what is available is {share * available / 1e9:.2f} GB:"
            " lower serve.max_length or raise rollout.cache_share"
        )
    return slots
