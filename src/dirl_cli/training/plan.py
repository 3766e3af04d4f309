"""What a run will hold in memory, part by part, from the model's configuration alone.

Activations are what one of transformers' Qwen3 layers leaves to backpropagation, counted from its code; that the sums
are those measured on a CPU is seen in `tests/test_plan.py` and `benchmarks/plan.py`. What differs on a GPU
(attention=flex) is counted from code alike, but no GPU has confirmed it.
"""

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dirl_cli.diffusion.layout import Strip
from dirl_cli.training.logprobs import CHUNK
from dirl_cli.training.optim import Optim
from dirl_cli.types import Decoding

Bytes = dict[str, int]
"""Bytes by part, such as `parameters`."""
# Bytes per logit of a chunk. In fp32, while its entropy is taken: tempered, truncated, log-prob, exp, clamped, product.
SCORING = 6 * 4
# While top-p sorts them: tempered, truncated, sorted, their softmax, and three times their order as int64.
SORTING = 4 * 4 + 3 * 8


@dataclass(frozen=True)
class Architecture:
    """What a model's memory depends on.

    vocabulary_parameters, layer_parameters: in embedding and head, and in all else. state_bytes: of its optimizer.
    queries, keys: heads × head_dim. inner: the MLP's width, or that of all `experts` a token goes to (0: there are
    none).
    """

    vocabulary_parameters: int
    layer_parameters: int
    state_bytes: int
    vocabulary: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    experts: int

    @property
    def parameters(self) -> int:
        return self.vocabulary_parameters + self.layer_parameters


def architecture(config: PreTrainedConfig, optim: Optim) -> Architecture:
    """A model and its optimizer in numbers, found by a step on tensors without storage."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizers = optim.build(model)
        for optimizer in optimizers:
            with suppress(RuntimeError):  # one that looks at values finds none, but has made its states by then
                optimizer.step()
        of_parameters = [states.values() for optimizer in optimizers for states in optimizer.state.values()]
        state_bytes = sum(one.nbytes for states in of_parameters for one in states if isinstance(one, torch.Tensor))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one where they are tied
        in_ends = sum(weight.numel() for weight in ends)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_experts_per_tok", 0)
    return Architecture(
        vocabulary_parameters=in_ends,
        layer_parameters=parameters - in_ends,
        state_bytes=state_bytes,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=config.num_attention_heads * head_dim,
        keys=config.num_key_value_heads * head_dim,
        inner=experts * config.moe_intermediate_size if experts else config.intermediate_size,
        experts=experts,
    )


@dataclass(frozen=True)
class MicroBatch:
    """The largest of a run: rows of so many tokens, of which `scored` in all. step: tokens of an optimizer step."""

    rows: int
    width: int
    scored: int
    step: int

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' * (self.rows > 1)} of {self.width:,}"
        return f"{self.step:,} tokens a step; micro-batches of {rows}, {self.scored:,} of them scored"


def micro_batch(strip: Strip, strips: float, row_tokens: int, micro_rows: int | None, processes: int) -> MicroBatch:
    """What as many tokens as so many strips have come to, where this strip is the longest."""
    tokens = math.ceil(strips * len(strip))
    width = max(len(strip), min(row_tokens, tokens))
    each = math.ceil(math.ceil(tokens / width) / processes)
    rows = min(micro_rows or each, each)
    return MicroBatch(rows, width, math.ceil(rows * width * len(strip.where) / len(strip)), tokens)


@dataclass(frozen=True)
class Parallelism:
    """How processes share a model: among how many each part is divided, and whether gradients stay after a step.

    Data parallelism divides nothing and keeps gradients, in the buckets in which they travel.
    """

    parameters: int = 1
    gradients: int = 1
    states: int = 1
    gradients_stay: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on each process's device, by part, in the phases of a run.

    bf16: whether the forward is autocast. dense: whether attention takes a dense mask (sdpa) or coordinates (flex).
    reference: whether a frozen copy of the model is there.
    """

    model: Architecture
    bf16: bool
    dense: bool
    checkpointing: bool = False
    reference: bool = False
    parallelism: Parallelism = Parallelism()

    def __str__(self) -> str:
        model, kind = self.model, "bf16 with weights in fp32" if self.bf16 else "fp32"
        parameters = f"{model.parameters:,} parameters, {model.vocabulary_parameters:,} of them in embedding and head"
        return f"{parameters}; {kind}; {'a dense attention mask' if self.dense else 'FlexAttention'}"

    @property
    def narrow(self) -> int:
        """Bytes of a value that autocast may narrow."""
        return 2 if self.bf16 else 4

    def resident(self) -> Bytes:
        """What is there in every phase."""
        return {
            "parameters": 4 * self.model.parameters // self.parallelism.parameters,
            "gradients": self.gradients() * self.parallelism.gradients_stay,
            "optimizer states": self.model.state_bytes // self.parallelism.states,
            "reference model": 4 * self.model.parameters * self.reference,
        }

    def gradients(self) -> int:
        return 4 * self.model.parameters // self.parallelism.gradients

    def layer(self) -> int:
        """Of one token: what a layer keeps for backpropagation."""
        model, narrow = self.model, self.narrow
        # of both norms: what comes in and what is normalised, in fp32, and what goes to five linear layers, each of
        # which casts it for itself under autocast
        norms = model.hidden * (2 * 8 + (5 * 2 if self.bf16 else 2 * 4))
        # queries and keys before their norms, in fp32, and normalised
        heads = (model.queries + model.keys) * (4 + narrow)
        # rotated queries, keys, values, what comes out; under a dense mask keys and values stand once per query head
        attention = narrow * (4 * model.queries if self.dense else 2 * model.queries + 2 * model.keys)
        # gate, up, silu(gate) and their product; an expert's tokens are gathered, and weighted afterwards
        mlp = narrow * (4 * model.inner + 2 * model.experts * model.hidden)
        return norms + heads + attention + mlp

    def update(self, batch: MicroBatch, sorts: bool = False) -> Bytes:
        """The most while learning from several such micro-batches. sorts: whether top-p truncates what is scored."""
        model, narrow, tokens, chunk = self.model, self.narrow, batch.rows * batch.width, min(batch.scored, CHUNK)
        layer = tokens * self.layer()
        mask = narrow * tokens * batch.width * self.dense
        between = 4 * model.hidden * tokens  # the input of a layer
        kept = model.layers * (between if self.checkpointing else layer) + 2 * between + mask
        copies = 2 * (model.layer_parameters + model.vocabulary * model.hidden) * self.bf16
        # the head's gradient is whole before it is added to that of earlier tokens
        logits = model.vocabulary * max((SORTING if sorts else SCORING) * chunk, 4 * (model.hidden + chunk))
        scoring = {"bf16 copies": copies, "activations": kept, "logits": logits}
        inside = 2 * narrow * model.inner * tokens  # gradients in the MLP
        if self.checkpointing:
            inside, copies = inside + layer, copies // model.layers
        deepest = {"bf16 copies": copies, "activations": kept + inside}
        busiest = max(scoring, deepest, key=lambda moment: sum(moment.values()))
        return self.resident() | {"gradients": self.gradients()} | busiest

    def rollout(self, slots: int, prompt: int, longest: int, block_size: int, decoding: Decoding) -> Bytes:
        """The most while sampling. prompt, longest: tokens of the longest prompt, and of it with its answer."""
        model, narrow = self.model, self.narrow
        length = (-(-longest // block_size) + 1) * block_size  # with the block that padding is written to
        cache = length * model.layers * model.keys * (4 + narrow)  # keys leave their norm in fp32
        entering = prompt + block_size
        # a token that enters: the MLP, or attention with keys and values once per query head; its row of the mask
        widest = max(4 * model.hidden + 3 * narrow * model.inner, 16 * model.queries)
        prefill = entering * (12 * model.hidden + widest + entering)
        attention = 8 * length * model.queries  # the same keys and values, all that are cached
        # per logit: itself, its log-prob, exp, and in fp64 that and its running sum; or where top-p sorts, the order
        logit = narrow + (24 + 4 * (decoding.top_k > 0) + 6 * (decoding.top_p < 1) if decoding.temperature else 12)
        sampling = block_size * model.vocabulary * logit
        return self.resident() | {"KV cache": slots * cache, "sampling": slots * max(prefill, attention, sampling)}
