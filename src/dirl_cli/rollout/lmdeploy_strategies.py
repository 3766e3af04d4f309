"""What this toolkit puts in the place of three of LMDeploy's strategies, so that its engine gives trajectories.

The agent's: it draws tokens, scores them and decides what is revealed, as the native engine does and from the same
randomness. The sampling's: it hands each request's key to the agent. The sequence's: it writes down what was revealed
when.

Shapes: N sequences in a forward, each with a current block of B tokens; V vocabulary.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lmdeploy.pytorch.config import DLLMConfig
from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
from lmdeploy.pytorch.engine.logits_process import SamplingInputs
from lmdeploy.pytorch.model_inputs import ModelInputs
from lmdeploy.pytorch.strategies.dllm.model_agent import DLLMExtraInputs, DLLMExtraOutputs, DLLMModelAgentStrategy
from lmdeploy.pytorch.strategies.dllm.sampling import DLLMSamplingStrategy
from lmdeploy.pytorch.strategies.dllm.sequence import DLLMSequenceStrategy, SchedulerSequenceDLLM
from torch import Tensor

from dirl_cli.diffusion.sampling import draw_candidates, draw_seed
from dirl_cli.diffusion.unmasking import State, find_strategy, quota, reveal, threshold_at, threshold_table
from dirl_cli.models.load import DiffusionLM
from dirl_cli.types import Decoding


@dataclass
class RequestTrace:
    """What became of a request so far: the fields of a `Trajectory`.

    The lists have an entry an answer token and grow by whole blocks. block: the one in the midst of denoising.
    """

    token_ids: list[int] = field(default_factory=list)
    reveal_step: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: int = 0
    denoise_forwards: int = 0
    block: "DenoisingBlock | None" = None

    def record(self, before: np.ndarray, after: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Note what a forward did to the current block. All (B,); before and after: LMDeploy's states of its tokens."""
        self.forwards += 1
        revealed = (before == DLLM_MASKED) & (after == DLLM_UNMASKED)
        if not revealed.any():
            return

        self.denoise_forwards += 1
        if self.block is None:
            self.block = DenoisingBlock.at_first_step(before)
        block = self.block
        block.step += 1
        block.reveal_step[revealed] = block.step
        block.logprobs[revealed] = logprobs[revealed]

        if (after != DLLM_MASKED).all():
            self.token_ids += token_ids[block.in_answer].tolist()
            self.reveal_step += block.reveal_step[block.in_answer].tolist()
            self.logprobs += block.logprobs[block.in_answer].tolist()
            self.block = None


@dataclass
class DenoisingBlock:
    """A block that is being denoised. in_answer: (B,) bool, which tokens are not the prompt's. step: the last one."""

    in_answer: np.ndarray
    reveal_step: np.ndarray
    logprobs: np.ndarray
    step: int = 0

    @classmethod
    def at_first_step(cls, states: np.ndarray) -> "DenoisingBlock":
        """A block of which nothing is revealed yet. states: (B,) LMDeploy's, masked where not the prompt's."""
        size = len(states)
        return cls(states == DLLM_MASKED, np.zeros(size, dtype=np.int64), np.zeros(size))


@dataclass
class LogprobInputs(DLLMExtraInputs):
    """LMDeploy's extra inputs plus the log-probs of the tokens that the last forward drew: (N * B,)."""

    logprobs: Tensor


@dataclass
class LogprobOutputs(DLLMExtraOutputs):
    """LMDeploy's extra outputs plus the drawn tokens' log-probs: (N * B,)."""

    logprobs: Tensor


@dataclass(frozen=True)
class DenseState(State):
    """Blocks with a candidate for every token, masked or not, so that no shape waits for the GPU to count them."""

    @cached_property
    def confidence(self) -> Tensor:
        return self.candidates.confidence.view(self.masked.shape) * self.masked

    @cached_property
    def entropy(self) -> Tensor:
        return self.candidates.entropy.view(self.masked.shape) * self.masked

    @cached_property
    def margin(self) -> Tensor:
        return self.candidates.margin.view(self.masked.shape) * self.masked


class UnmaskingAgent(DLLMModelAgentStrategy):
    """Draws, scores and reveals by this toolkit's rules. `decoding` is that of the requests in flight."""

    def __init__(self, config: DLLMConfig, lm: DiffusionLM) -> None:
        super().__init__(config, lm.mask_token_id)
        self.unsampled = torch.tensor(lm.unsampled_ids, device=lm.device)
        self.decoding = Decoding()

    async def sample(
        self, logits: Tensor, inputs: ModelInputs, extra_inputs: DLLMExtraInputs, sampling: SamplingInputs
    ) -> tuple[Tensor, None, Tensor, LogprobInputs]:
        """Replace the model agent's `async_sampling_logits`, which sorts the vocabulary and spreads seeds wrongly.

        logits: (N * B, V) of the current blocks, as the model gives them.
        Returns their tokens with the drawn ones where masked (twice, as LMDeploy wants them), their states and
        log-probs: (N * B,) each.
        """
        options = self.decoding
        size = self.block_size
        input_ids = self.slice_outputs(inputs.input_ids.flatten(), inputs.seq_length)  # (N * B,)
        states = extra_inputs.dllm_mask.view(-1, size)

        # A block without a masked token is one whose keys and values this forward cached.
        is_cached = (states == DLLM_UNMASKED).all(1, keepdim=True)
        states = states.masked_fill(is_cached, DLLM_CACHED)
        masked = states == DLLM_MASKED

        # The same position, step and key as in the native engine, and so the same random numbers.
        step = self._step(inputs, sampling, is_cached.squeeze(1))
        start = inputs.history_lengths + inputs.seq_length - size
        position = start[:, None] + torch.arange(size, device=input_ids.device)
        seeds = draw_seed(sampling.random_seeds[:, None], position, step[:, None]).flatten()
        drawn = draw_candidates(
            logits,
            seeds if options.temperature else None,
            options.temperature,
            options.top_k,
            options.top_p,
            options.confidence,
            self.unsampled,
        )
        owed = quota(step, size, options.denoising_steps)
        threshold = threshold_at(options, threshold_table(options, size).to(step.device), step)
        revealed = reveal(find_strategy(options.strategy), DenseState(masked, drawn, owed, threshold, start))
        states = states.masked_fill(revealed, DLLM_UNMASKED)
        tokens = torch.where(masked.flatten(), drawn.tokens, input_ids)
        return tokens, None, tokens, LogprobInputs(states.flatten(), drawn.logprobs)

    def _step(self, inputs: ModelInputs, sampling: SamplingInputs, is_cached: Tensor) -> Tensor:
        """The denoising step that each sequence's block is at, from 1: (N,). is_cached: (N,) bool.

        LMDeploy carries an offset for each token from forward to forward, and adds 1: here it counts steps.
        """
        offsets = sampling.random_offsets.view(-1, self.block_size)[:, 0]
        if not inputs.is_decoding:
            offsets = torch.zeros_like(offsets)
        step = offsets + 1
        sampling.random_offsets = torch.where(is_cached, -1, step - 1).repeat_interleave(self.block_size)
        return step

    def make_extra_outputs(self, extra_inputs: LogprobInputs) -> LogprobOutputs:
        return LogprobOutputs(extra_inputs.dllm_mask, extra_inputs.logprobs)


class KeyedSampling(DLLMSamplingStrategy):
    """Hands request keys to the agent: whole, one a sequence and also for greedy ones, which LMDeploy would not."""

    def make_sampling_inputs(self, seqs: list[Any]) -> SamplingInputs:
        inputs = super().make_sampling_inputs(seqs)
        inputs.random_seeds = torch.tensor([sequence.sampling_param.random_seed for sequence in seqs])
        return inputs


class TracedSequence(SchedulerSequenceDLLM):
    """A sequence that keeps its trace. logprobs: (B,) of the forward that it is about to be updated with."""

    trace: RequestTrace
    logprobs: np.ndarray

    def _update_token_ids_inputs(self, token_ids: np.ndarray, dllm_mask: np.ndarray) -> None:
        super()._update_token_ids_inputs(token_ids, dllm_mask)
        self.output_start_pos = self.num_valid_ids  # LMDeploy sees no stop token in the block that the prompt begins

    def _update_token_ids_decode(self, token_ids: np.ndarray, dllm_mask: np.ndarray) -> None:
        before = self.dllm_mask.copy()
        super()._update_token_ids_decode(token_ids, dllm_mask)
        self.trace.record(before, dllm_mask, token_ids, self.logprobs)


class TracedSequences(DLLMSequenceStrategy):
    """Makes traced sequences; `traces` holds their traces by session."""

    def __init__(self, block_size: int, dllm_mask_token: int) -> None:
        super().__init__(block_size, dllm_mask_token)
        self.traces: dict[int, RequestTrace] = {}

    def make_sequence(self, seq_id: int, session: Any, **options: Any) -> TracedSequence:
        sequence = TracedSequence(seq_id=seq_id, session=session, **options)
        sequence.trace = self.traces[session.session_id] = RequestTrace()
        return sequence

    def update_running(self, running: list[TracedSequence], batched_outputs: Any, *args: Any, **options: Any) -> None:
        by_sequence = batched_outputs.extra_outputs.logprobs.view(len(running), -1).numpy()  # (N, B)
        for sequence, logprobs in zip(running, by_sequence, strict=True):
            sequence.logprobs = logprobs
        super().update_running(running, batched_outputs, *args, **options)
