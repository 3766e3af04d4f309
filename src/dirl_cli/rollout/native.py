"""The engine that runs anywhere: batched, continuous, KV-cached block decoding on any transformers decoder.

One forward commits what a sequence has finished (at first the prompt's whole blocks, then each block) and denoises
its next block, so caching costs no forward of its own. Sequences join and leave at block boundaries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dirl_cli.diffusion.layout import Coordinates, attends
from dirl_cli.diffusion.sampling import draw, request_key, uniform
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal, spread
from dirl_cli.errors import DirlError
from dirl_cli.models.attention import dense_attention
from dirl_cli.models.cache import SlotCache
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.rollout.sampler import Watch
from dirl_cli.types import Decoding, Trajectory


@dataclass
class Request:
    """An answer in the making. pending: finished tokens whose keys and values are not cached yet."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    key: int
    pending: list[int] = field(default_factory=list)
    start: int = 0  # position of the block being denoised
    token_ids: list[int] = field(default_factory=list)
    reveal_step: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: int = 0


class NativeSampler:
    """Samples from `lm` with at most `max_batch` sequences at once."""

    def __init__(self, lm: DiffusionLM, max_batch: int = 64) -> None:
        if max_batch < 1:
            raise DirlError("max_batch must be at least 1")
        self.lm = lm
        self.max_batch = max_batch
        self.weights_version = 0

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """See `Sampler.sample`."""
        found = {(prompt, sample): trajectory for prompt, sample, trajectory in self.stream(prompts, n, decoding)}
        return [[found[prompt, sample] for sample in range(n)] for prompt in range(len(prompts))]

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        decoding: Decoding,
        first: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, int, Trajectory]]:
        """See `Sampler.stream`."""
        self.lm.model.eval()
        block_size = self._block_size(decoding)
        queue = list(reversed(requests(prompts, n, decoding, first, seeds)))
        if not queue:
            return
        longest = max(len(request.prompt_ids) for request in queue)
        if longest > self.lm.longest_prompt:
            raise DirlError(
                f"a prompt has {longest} tokens and the model has room for {self.lm.longest_prompt}: shorten it"
            )
        end = min(longest + decoding.max_new_tokens, self.lm.longest_prompt + 1)
        blocks = -(-end // block_size) + 1  # one more for padding to write to
        batch = Batch(self.lm, decoding, min(self.max_batch, len(queue)), block_size, blocks * block_size)
        while queue or batch.running:
            while queue and batch.free:
                batch.admit(queue.pop())
            for slots in batch.groups():
                batch.denoise(slots)
                if watch:
                    batch.show(slots, watch)
                for request, stop_reason in batch.finish_blocks(slots):
                    yield request.prompt, request.sample, self._trajectory(request, stop_reason, decoding)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy into the model what does not already share its storage; every later trajectory carries `version`."""
        own = self.lm.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in named_tensors:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self.weights_version = version

    def sleep(self) -> None:
        """Nothing to give back: the cache lives only as long as a stream."""

    def wake(self) -> None:
        """Nothing to take."""

    def _block_size(self, decoding: Decoding) -> int:
        if decoding.block_size not in (None, self.lm.block_size):
            raise DirlError(
                f"decoding.block_size is {decoding.block_size} and the model's is {self.lm.block_size}:"
                " leave decoding.block_size out"
            )
        return self.lm.block_size

    def _trajectory(self, request: Request, stop_reason: str, decoding: Decoding) -> Trajectory:
        return Trajectory(
            prompt_ids=request.prompt_ids,
            token_ids=request.token_ids,
            reveal_step=request.reveal_step,
            logprobs=request.logprobs,
            stop_reason="stop" if stop_reason == "stop" else "length",
            denoise_forwards=request.forwards,
            forwards=request.forwards,  # commits ride on denoising forwards
            weights_version=self.weights_version,
            stop_token_ids=decoding.stop_token_ids,
        )


def requests(
    prompts: Sequence[list[int]], n: int, decoding: Decoding, first: Sequence[int] | None, seeds: Sequence[int] | None
) -> list[Request]:
    """One request an answer, in order."""
    wanted = []
    for i, prompt_ids in enumerate(prompts):
        seed = seeds[i] if seeds else decoding.seed
        for sample in range(first[i] if first else 0, n):
            wanted.append(Request(i, sample, prompt_ids, request_key(seed, prompt_ids, sample)))
    return wanted


class Batch:
    """The slots of a running batch: their blocks as tensors (slots, B), their requests, and the cache."""

    def __init__(self, lm: DiffusionLM, decoding: Decoding, slots: int, block_size: int, length: int) -> None:
        self.lm, self.decoding, self.block_size = lm, decoding, block_size
        self.strategy = find_strategy(decoding.strategy)
        self.stops = set(decoding.stop_token_ids)
        device = lm.device
        self.unsampled = torch.tensor(lm.unsampled_ids, device=device)
        self.cache = SlotCache(slots, length)
        self.padding_position = length - 1
        self.last_position = lm.longest_prompt + 1
        self.free = list(reversed(range(slots)))
        self.running: dict[int, Request] = {}
        self.tokens = torch.full((slots, block_size), lm.mask_token_id, device=device)
        self.masked = torch.zeros(slots, block_size, dtype=torch.bool, device=device)
        self.revealed_at = torch.zeros(slots, block_size, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, block_size, device=device)
        self.step = torch.zeros(slots, dtype=torch.long, device=device)
        self.start = torch.zeros(slots, dtype=torch.long, device=device)
        self.key = torch.zeros(slots, dtype=torch.long, device=device)

    def admit(self, request: Request) -> None:
        """Give a request a slot; the rest of its prompt that fills no block begins its first one."""
        slot = self.free.pop()
        request.start = len(request.prompt_ids) // self.block_size * self.block_size
        request.pending = request.prompt_ids[: request.start]
        self.running[slot] = request
        self.key[slot] = request.key
        self._open_block(slot, request.prompt_ids[request.start :])

    def _open_block(self, slot: int, given: list[int]) -> None:
        self.tokens[slot] = self.lm.mask_token_id
        self.masked[slot] = True
        self.revealed_at[slot] = 0
        self.step[slot] = 0
        self.start[slot] = self.running[slot].start
        if given:
            self.tokens[slot, : len(given)] = torch.tensor(given, device=self.tokens.device)
            self.masked[slot, : len(given)] = False

    def groups(self) -> list[list[int]]:
        """Running slots by what they commit: nothing, a block, or a prompt, so that little is padded."""
        kinds: dict[int, list[int]] = {}
        for slot in sorted(self.running):
            pending = len(self.running[slot].pending)
            kinds.setdefault(min(pending, self.block_size + 1), []).append(slot)
        return list(kinds.values())

    def denoise(self, slots: list[int]) -> None:
        """One forward of `slots`: commit what is pending, reveal some of the current block."""
        index = torch.tensor(slots, device=self.tokens.device)
        hidden = self._forward(slots, index)[:, -self.block_size :]  # (slots, B, D)
        masked = self.masked[index]
        self.step[index] += 1
        step = self.step[index]
        options = self.decoding
        drawn = draw(
            self.lm.model.get_output_embeddings()(hidden[masked]),
            self._noise(index, step)[masked] if options.temperature else None,
            options.temperature,
            options.top_k,
            options.top_p,
            options.confidence,
            self.unsampled,
        )
        state = State(masked, drawn, quota(step, self.block_size, options.denoising_steps), options.threshold)
        chosen = reveal(self.strategy, state)
        self.tokens[index] = torch.where(chosen, spread(drawn.tokens, masked), self.tokens[index])
        self.logprobs[index] = torch.where(chosen, spread(drawn.logprobs, masked), self.logprobs[index])
        self.revealed_at[index] = torch.where(chosen, step[:, None], self.revealed_at[index])
        self.masked[index] = masked & ~chosen

    def _noise(self, index: Tensor, step: Tensor) -> Tensor:
        """(slots, B) uniform numbers, each a function of its request, position and step."""
        position = self.start[index][:, None] + torch.arange(self.block_size, device=index.device)
        return uniform(self.key[index][:, None], position, step[:, None])

    def _forward(self, slots: list[int], index: Tensor) -> Tensor:
        """Hidden states of pending tokens and the current block, the former padded on the left. (slots, W, D)."""
        device = index.device
        pending = [self.running[slot].pending for slot in slots]
        widest = max(len(tokens) for tokens in pending)
        starts = self.start[index]
        positions = starts[:, None] + torch.arange(-widest, self.block_size, device=device)
        token_ids = torch.cat([torch.zeros(len(slots), widest, dtype=torch.long, device=device), self.tokens[index]], 1)
        if widest:
            padded = [[self.lm.pad_token_id] * (widest - len(tokens)) + tokens for tokens in pending]
            lengths = torch.tensor([len(tokens) for tokens in pending], device=device)
            token_ids[:, :widest] = torch.tensor(padded, device=device)
            is_padding = torch.arange(-widest, self.block_size, device=device) < -lengths[:, None]
            positions = positions.masked_fill(is_padding, self.padding_position)
        for slot in slots:
            self.running[slot].pending = []
            self.running[slot].forwards += 1
        used = max(self.running[slot].start for slot in slots) + self.block_size
        with dense_attention(self.lm.model):
            output = self.lm.model.get_decoder()(
                input_ids=token_ids,
                position_ids=positions,
                attention_mask=block_causal(positions, used, self.block_size),
                past_key_values=self.cache.at(index, positions, used),
                use_cache=False,
            )
        return output.last_hidden_state

    def show(self, slots: list[int], watch: Watch) -> None:
        for slot in slots:
            request = self.running[slot]
            given = max(len(request.prompt_ids) - request.start, 0)
            watch(request.prompt, request.sample, request.token_ids + self.tokens[slot].tolist()[given:])

    def finish_blocks(self, slots: list[int]) -> Iterator[tuple[Request, str]]:
        """Move full blocks of `slots` to their requests; yields those that thereby end."""
        unfinished = self.masked[slots].any(1).tolist()
        full = [slot for slot, hidden in zip(slots, unfinished, strict=True) if not hidden]
        if not full:
            return
        columns = zip(
            full, self.tokens[full].tolist(), self.revealed_at[full].tolist(), self.logprobs[full].tolist(), strict=True
        )
        for slot, tokens, revealed_at, logprobs in columns:
            request = self.running[slot]
            given = max(len(request.prompt_ids) - request.start, 0)
            request.token_ids += tokens[given:]
            request.reveal_step += revealed_at[given:]
            request.logprobs += logprobs[given:]
            stopped = not self.stops.isdisjoint(tokens[given:])
            is_full = request.start + self.block_size >= self.last_position
            if stopped or is_full or len(request.token_ids) >= self.decoding.max_new_tokens:
                del self.running[slot]
                self.free.append(slot)
                yield request, "stop" if stopped else "length"
            else:
                request.pending = tokens
                request.start += self.block_size
                self._open_block(slot, [])


def block_causal(positions: Tensor, used: int, block_size: int) -> Tensor:
    """The attention rule where all is clean: (slots, 1, W, used) bool. positions: (slots, W)."""
    same = torch.zeros(1, dtype=torch.long, device=positions.device)
    keys = torch.arange(used, device=positions.device) // block_size
    queries = positions[:, :, None] // block_size
    return attends(Coordinates(same, same, queries, same), Coordinates(same, same, keys, same))[:, None]
