"""SGLang's algorithm `Dirl`: what its loop calls after each forward. It is imported in SGLang's processes alone."""

from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from torch import Tensor

from dirl_cli.errors import DirlError
from dirl_cli.rollout.sglang_blocks import (
    FIELD,
    BlockRequest,
    BlockState,
    denoise,
    open_blocks,
    plain_request,
    request_of,
)


class Dirl(DllmAlgorithm):
    """Draws, scores and reveals by this toolkit's rules, each request by its own.

    requests: SGLang's, of the batch that its loop is at. records: what became of each one's block; None while it is
    not full, and of the prompt's blocks.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not self.fdfo:
            raise DirlError("the algorithm Dirl goes forward by forward: leave out --no-dllm-fdfo")
        self.requests: Sequence[Any] = ()
        self.records: list[dict[str, Any] | None] = []

    @classmethod
    def validate_request(cls, request: Any) -> str | None:
        """What is wrong with a request, which SGLang then refuses."""
        try:
            block_request(request)
        except (DirlError, LookupError, TypeError) as error:
            return str(error)
        return None

    def init_step_state(self, forward_batch: Any) -> list[BlockState]:
        """See `DllmAlgorithm.init_step_state`."""
        in_answer = ~self._prompt_mask(forward_batch)
        return open_blocks(in_answer, [block_request(request) for request in self.requests])

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[BlockState]) -> list[bool]:
        """See `DllmAlgorithm.step`. A block is done by the forward that finds it full, which caches it."""
        tokens = forward_batch.input_ids.view(len(states), self.block_size)
        start = forward_batch.positions.view(len(states), self.block_size)[:, 0].long()
        done = denoise(states, tokens, full_logits.view(tokens.numel(), -1), start)
        self.records = []
        for state, row, is_done in zip(states, tokens, done, strict=True):
            self.records.append(state.record(row) if is_done and state.answer_tokens else None)
        return done


def block_request(request: Any) -> BlockRequest:
    """What SGLang's request says of its blocks. Raises DirlError like `request_of`."""
    sampling = request.sampling_params
    config = request.dllm_config
    if isinstance(sampling.custom_params, dict) and FIELD in sampling.custom_params:
        return request_of(sampling.custom_params, config.block_size, config.mask_id)
    return plain_request(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.sampling_seed, request.rid, config.mask_id
    )


def keep_records(forward: Callable[..., Any], worker: Any, forward_batch: Any, batch: Any = None) -> Any:
    """Around SGLang's forward of a batch: what it tells of full blocks goes to the responses of their requests.

    A response has a list with an entry an answer token, of which SGLang sends the part that its tokens have: each
    block's record stands at its first token, so that no stop token in the block cuts it off.
    """
    algorithm = worker.dllm_algorithm
    if batch is None or not isinstance(algorithm, Dirl):
        return forward(worker, forward_batch, batch)

    algorithm.requests = batch.reqs
    result = forward(worker, forward_batch, batch)
    for request, record in zip(batch.reqs, algorithm.records, strict=True):
        if record is None:
            continue
        if request.customized_info is None:
            request.customized_info = {FIELD: []}
        entries = request.customized_info[FIELD]
        start = len(entries)
        entries += [record | {"start": start}] + [None] * (len(record["token_ids"]) - 1)
    return result
