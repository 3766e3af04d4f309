"""The engine that runs anywhere: batched, continuous, KV-cached block decoding on any transformers decoder.

One forward commits what a sequence has finished (at first the prompt's whole blocks, then each block) and denoises
its next block, so caching costs no forward of its own. Sequences join and leave at block boundaries.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dirl_cli.diffusion.sampling import request_key
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.low_precision import cast_linear_weights, recast
from dirl_cli.rollout.forward import Runs
from dirl_cli.rollout.forward_gpu import Blocks, Graphs, at_once, block_attention
from dirl_cli.rollout.sampler import Watch
from dirl_cli.rollout.scheduler import Answer, Batch
from dirl_cli.rollout.scheduler import Request as Request
from dirl_cli.types import Decoding, Trajectory


class NativeSampler:
    """Samples from `lm` with at most `max_batch` sequences at once.

    by_blocks: forwards as on a GPU, where that is the default. own_weights: nobody else uses those of `lm`, so that
    they are not kept while it sleeps.
    """

    def __init__(
        self, lm: DiffusionLM, max_batch: int = 64, by_blocks: bool | None = None, own_weights: bool = False
    ) -> None:
        if max_batch < 1:
            raise DirlError("max_batch must be at least 1")
        self.lm, self.own_weights = lm, own_weights
        self.max_batch = max_batch
        self.weights_version = 0
        self.by_blocks = lm.device.type == "cuda" if by_blocks is None else by_blocks
        self.kept: Blocks | None = None  # with its graphs, from one stream to the next
        self.narrow: PreTrainedModel | None = None

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
        slots, length = min(self.max_batch, len(queue)), -(-end // block_size) * block_size
        forwards = self._blocks(slots, length) if self.by_blocks else Runs(self.lm, slots, length)
        batch = Batch(forwards, decoding, slots)
        while queue or batch.running:
            while queue and batch.free:
                batch.admit(queue.pop())
            for answer in batch.step(watch):
                yield answer.request.prompt, answer.request.sample, self._trajectory(answer, decoding)
        self.kept = forwards if isinstance(forwards, Blocks) else None

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy into the model what does not already share its storage; every later trajectory carries `version`."""
        own = self.lm.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in named_tensors:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        if self.narrow:
            recast(self.narrow, self.lm.model)
        self.weights_version = version

    def sleep(self) -> None:
        """Give back own weights, and what the next stream makes anew: the cache, the graphs, the narrowed weights."""
        self.kept = self.narrow = None
        if self.own_weights:
            for parameter in self.lm.model.parameters():
                parameter.untyped_storage().resize_(0)
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take room for own weights, which `update_weights` has to fill."""
        if self.own_weights:
            for parameter in self.lm.model.parameters():
                parameter.untyped_storage().resize_(parameter.nbytes)

    def _blocks(self, slots: int, length: int) -> Blocks:
        """The slots kept from an earlier stream if they are enough, else new ones."""
        kept, self.kept = self.kept, None  # not for two streams at once
        lm = replace(self.lm, model=self._model())
        if kept and kept.lm.model is lm.model and slots <= kept.slots and length <= kept.length:
            return kept
        del kept  # before there is another
        if lm.device.type != "cuda":
            return Blocks(lm, slots, length, block_attention, at_once)
        from dirl_cli.rollout.attention_triton import decode_attention  # which only a GPU has the package for

        torch.cuda.set_device(lm.device)  # on which Triton starts
        return Blocks(lm, slots, length, decode_attention, Graphs())

    def _model(self) -> PreTrainedModel:
        """The model, its linear layers in autocast's dtype: a graph would cast them again in every forward."""
        model, device = self.lm.model, self.lm.device.type
        if not torch.is_autocast_enabled(device) or model.dtype == torch.get_autocast_dtype(device):
            return model
        self.narrow = self.narrow or cast_linear_weights(model, torch.get_autocast_dtype(device))
        return self.narrow

    def _block_size(self, decoding: Decoding) -> int:
        if decoding.block_size not in (None, self.lm.block_size):
            raise DirlError(
                f"decoding.block_size is {decoding.block_size} and the model's is {self.lm.block_size}:"
                " leave decoding.block_size out"
            )
        return self.lm.block_size

    def _trajectory(self, answer: Answer, decoding: Decoding) -> Trajectory:
        return Trajectory(
            prompt_ids=answer.request.prompt_ids,
            token_ids=answer.token_ids,
            reveal_step=answer.reveal_step,
            logprobs=answer.logprobs,
            stop_reason="stop" if answer.stopped else "length",
            denoise_forwards=answer.forwards,
            forwards=answer.forwards,  # commits ride on denoising forwards
            weights_version=self.weights_version,
            stop_token_ids=decoding.stop_token_ids,
            block_size=self.lm.block_size,
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
