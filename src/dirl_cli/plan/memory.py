"""What a run will hold in memory, part by part, from the model's configuration alone.

Activations are what one of transformers' Qwen3 layers leaves to backpropagation, counted from its code; that the sums
are those measured on a CPU is seen in `tests/plan/test_plan.py` and `benchmarks/plan.py`. What differs on a GPU
(attention=flex) is counted from code alike, but no GPU has confirmed it.
"""

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dirl_cli.diffusion.layout import Strip
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.text import counted
from dirl_cli.training.logprobs import tokens_at_once
from dirl_cli.training.optim import Optim
from dirl_cli.types import SHARING, Decoding

Bytes = dict[str, int]
"""Bytes by part, such as `parameters`."""
# Bytes per logit of a chunk. In fp32: tempered, exp.
SCORING = 2 * 4
# Truncated by top-k, while its entropy is taken: truncated, with the target's own, log-prob, exp, clamped, two masks.
TRUNCATING = 5 * 4 + 2
# While top-p sorts them: tempered, sorted, their order as int64, their softmax and its sums, two masks.
SORTING = 5 * 4 + 8 + 2

PREFILL = 16384  # tokens of prompts that the native engine computes at once on a GPU


def logit_bytes(decoding: Decoding) -> int:
    """What scoring holds of a logit in the softmax that tokens were drawn from."""
    if not decoding.truncates:
        return SCORING
    return SORTING + 5 * (decoding.top_k > 0) if decoding.top_p < 1 else TRUNCATING


@dataclass(frozen=True)
class Architecture:
    """What a model's memory depends on.

    vocabulary_parameters, layer_parameters: in embedding and head, and in all else, without an adapter.
    trained: parameters with a gradient. weight_bytes: of all of them, as they are kept. merged_bytes: of the weights
    that a sampler has instead of adapted ones. state_bytes: of its optimizer.
    queries, keys: heads × head_dim. inner: the MLP's width, or that of all `experts` a token goes to (0: there are
    none).
    """

    vocabulary_parameters: int
    layer_parameters: int
    trained: int
    weight_bytes: int
    merged_bytes: int
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

    @property
    def is_full_finetune(self) -> bool:
        """Whether all parameters are trained."""
        return self.trained == self.parameters


def architecture(
    config: PreTrainedConfig, optim: Optim, peft: Peft = FullFinetune(), dtype: torch.dtype = torch.float32
) -> Architecture:
    """A model whose weights are kept in `dtype` and its optimizer in numbers, by a step on tensors without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        peft.adapt(model)
    with FakeTensorMode():
        use_fake_parameters(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizers = optim.build(model)
        for optimizer in optimizers:
            with suppress(RuntimeError):  # one that looks at values finds none, but has made its states by then
                optimizer.step()
        of_parameters = [states.values() for optimizer in optimizers for states in optimizer.state.values()]
        state_bytes = sum(one.nbytes for states in of_parameters for one in states if isinstance(one, torch.Tensor))
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one where they are tied
        in_ends = sum(weight.numel() for weight in ends)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_experts_per_tok", 0)
    return Architecture(
        vocabulary_parameters=in_ends,
        layer_parameters=parameters - in_ends,
        trained=sum(parameter.numel() for parameter in trained),
        weight_bytes=peft.weight_bytes(model),
        merged_bytes=peft.merged_bytes(model),
        state_bytes=state_bytes,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=config.num_attention_heads * head_dim,
        keys=config.num_key_value_heads * head_dim,
        inner=experts * config.moe_intermediate_size if experts else config.intermediate_size,
        experts=experts,
    )


def use_fake_parameters(model: nn.Module) -> None:
    """Put parameters that look as if they were on a CPU, where optimizers can be, in the place of those on `meta`."""
    like = {p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, like[parameter])


@dataclass(frozen=True)
class MicroBatch:
    """The largest of a run: rows of so many tokens, of which `scored` in all. step: tokens of an optimizer step."""

    rows: int
    width: int
    scored: int
    step: int

    def __str__(self) -> str:
        rows = f"{counted(self.rows, 'row')} of {self.width:,}"
        return f"{self.step:,} tokens a step; micro-batches of {rows}, {self.scored:,} of them scored"


def largest_micro_batch(
    strip: Strip, strips: float, row_tokens: int, micro_rows: int | None, processes: int
) -> MicroBatch:
    """What as many tokens as so many strips have come to, where this strip is the longest."""
    tokens = math.ceil(strips * len(strip))
    width = max(len(strip), min(row_tokens, tokens))
    each = math.ceil(math.ceil(tokens / width) / processes)
    rows = min(micro_rows or each, each)
    return MicroBatch(rows, width, math.ceil(rows * width * len(strip.where) / len(strip)), tokens)


@dataclass(frozen=True)
class Parallelism:
    """How processes share a model: among how many each part is divided, and whether gradients stay after a step.

    Data parallelism divides nothing and keeps gradients, in the buckets in which they travel. FSDP2 divides all and
    gathers a layer at a time, embedding and head for as long as a forward and its backward last, or with
    `keeps_gathered` all of them; and what samples has a copy of the whole.
    """

    parameters: int = 1
    gradients: int = 1
    states: int = 1
    gradients_stay: bool = False
    gathers: bool = False
    keeps_gathered: bool = False


def parallelism(launch: str, processes: int) -> Parallelism:
    """What a run's `launch` divides."""
    if launch in SHARING:
        return Parallelism(processes, processes, processes, gathers=True, keeps_gathered=launch == "zero2")
    return Parallelism(gradients_stay=processes > 1)


@dataclass(frozen=True)
class Memory:
    """Bytes on each process's device, by part, in the phases of a run.

    bf16: whether the forward is autocast. dense: whether attention takes a dense mask (sdpa) or coordinates (flex).
    reference: whether a frozen model is there. samples: whether a sampler is. copy_stays: whether its own copy of the
    weights does during an update. cuda: whether the device is a GPU.
    """

    model: Architecture
    bf16: bool
    dense: bool
    checkpointing: bool = False
    reference: bool = False
    samples: bool = False
    copy_stays: bool = False
    cuda: bool = False
    parallelism: Parallelism = Parallelism()

    def __str__(self) -> str:
        model, kind = self.model, "bf16" if self.bf16 else "fp32"
        parameters = f"{model.parameters:,} parameters, {model.vocabulary_parameters:,} of them in embedding and head"
        if not model.is_full_finetune:
            parameters += f"; {model.trained:,} trained beside them"
        elif self.bf16:
            kind += " with weights in fp32"
        return f"{parameters}; {kind}; {'a dense attention mask' if self.dense else 'FlexAttention'}"

    @property
    def narrow(self) -> int:
        """Bytes of a value that autocast may narrow."""
        return 2 if self.bf16 else 4

    def resident(self) -> Bytes:
        """What is there in every phase."""
        return {
            "parameters": self.model.weight_bytes // self.parallelism.parameters,
            "merged weights": self.model.merged_bytes * self.samples,
            "sampler's copy": self.copy() * self.copy_stays,
            "gradients": self.gradients() * self.parallelism.gradients_stay,
            "optimizer states": self.model.state_bytes // self.parallelism.states,
            "reference model": 4 * self.model.parameters * (self.reference and self.model.is_full_finetune),
        }

    def gradients(self) -> int:
        return 4 * self.model.trained // self.parallelism.gradients

    def copy(self) -> int:
        """Of what samples, where it cannot use the weights that are trained; its linear layers are in bf16 at once."""
        return 4 * self.model.parameters - self.bf16_copies() * self.parallelism.gathers

    def bf16_copies(self) -> int:
        """Of the weights of all linear layers in bf16, where they are kept in fp32 and that is not what is wanted."""
        linear = self.model.layer_parameters + self.model.vocabulary * self.model.hidden
        return 2 * linear * (self.bf16 and self.model.is_full_finetune)

    def layer(self) -> int:
        """Of one token: what a layer keeps for backpropagation."""
        model, narrow = self.model, self.narrow
        # of both norms: what comes in and, where their weights are trained, what is normalised, in fp32; and what goes
        # to five linear layers, each of which casts it for itself under autocast
        norms = model.hidden * (2 * (4 + 4 * model.is_full_finetune) + (5 * 2 if self.bf16 else 2 * 4))
        # queries and keys before their norms, in fp32, and normalised
        heads = (model.queries + model.keys) * (4 + narrow * model.is_full_finetune)
        # rotated queries, keys, values, what comes out; under a dense mask keys and values stand once per query head
        attention = narrow * (4 * model.queries if self.dense else 2 * model.queries + 2 * model.keys)
        # gate, up, silu(gate) and their product; an expert's tokens are gathered, and weighted afterwards
        mlp = narrow * (4 * model.inner + 2 * model.experts * model.hidden)
        return norms + heads + attention + mlp + narrow * model.queries * (self.bf16 and not model.is_full_finetune)

    def update(self, batch: MicroBatch, scoring: int = SCORING) -> Bytes:
        """The most while learning from several such micro-batches. scoring: bytes of each logit that is scored."""
        model, narrow, tokens = self.model, self.narrow, batch.rows * batch.width
        chunk = min(batch.scored, tokens_at_once(model.vocabulary))
        layer = tokens * self.layer()
        mask = narrow * tokens * batch.width * self.dense
        between = (4 if model.is_full_finetune else narrow) * model.hidden * tokens  # the input of a layer
        kept = model.layers * (between if self.checkpointing else layer) + 2 * between + mask
        copies = 2 * model.layer_parameters * (self.bf16 and model.is_full_finetune)
        # the head's gradient is whole before it is added to that of earlier tokens, and in bf16 a chunk's part of it
        slope = max(6 * chunk, 2 * (model.hidden + chunk)) if self.bf16 else 4 * chunk
        of_head = (4 * model.hidden + slope) * model.is_full_finetune
        logits = model.vocabulary * max(scoring * chunk, of_head)
        of_layer = copies // model.layers
        cast = self.bf16_copies()
        if self.parallelism.gathers:  # where none is kept
            copies, cast = of_layer, 2 * model.vocabulary * model.hidden * self.bf16
        at_head = {"bf16 copies": cast, "activations": kept, "logits": logits}
        inside = 2 * narrow * model.inner * tokens  # gradients in the MLP
        if self.checkpointing:
            inside, copies = inside + layer, of_layer
        deepest = {"bf16 copies": copies, "activations": kept + inside}
        busiest = max(at_head, deepest, key=lambda moment: sum(moment.values()))
        at_once = model.vocabulary_parameters + 2 * model.layer_parameters // model.layers  # and as many gradients
        gathered = 4 * at_once + 4 * (model.parameters if self.parallelism.keeps_gathered else at_once)
        sharing = {"gathered": gathered * self.parallelism.gathers}
        return self.resident() | {"gradients": self.gradients()} | sharing | busiest

    def rollout(self, slots: int, prompt: int, longest: int, block_size: int, decoding: Decoding) -> Bytes:
        """The most while the native engine samples. prompt: tokens of the longest; longest: also of its answer."""
        model, narrow = self.model, self.narrow
        length = -(-longest // block_size) * block_size
        cache = length * model.layers * model.keys * 2 * narrow
        entering = prompt + block_size
        # a token that enters: the MLP, or attention with keys and values once per query head; its row of the mask
        widest = max(4 * model.hidden + 3 * narrow * model.inner, 16 * model.queries)
        if self.cuda:  # some prompts at a time, keys and values read where they are; a slot to spare
            prefill = min(slots * entering, PREFILL) * (12 * model.hidden + widest)
            busiest, slots = max(prefill, self.drawing(slots * block_size, decoding)), slots + 1
        else:
            prefill = entering * (12 * model.hidden + widest + entering)
            attention = 8 * length * model.queries  # the same keys and values, all that are cached
            busiest = slots * max(prefill, attention, self.drawing(block_size, decoding))
        gathers = self.parallelism.gathers
        copies = self.bf16_copies() * (self.cuda and not gathers)  # instead of a cast in every forward
        copy = {"sampler's copy": self.copy() * (gathers or self.copy_stays)}
        return self.resident() | copy | {"bf16 copies": copies, "KV cache": slots * cache, "sampling": busiest}

    def drawing(self, tokens: int, decoding: Decoding) -> int:
        """The most while so many tokens are drawn from their logits."""
        # per logit: itself, its log-prob, exp, and the running sum in fp64; where top-p sorts, sorted, the order, sums
        draw = 16 + 4 * (decoding.top_k > 0) + 12 * (decoding.top_p < 1) if decoding.temperature else 8
        draw *= decoding.truncates or not self.cuda  # else one pass over the logits
        return tokens * self.model.vocabulary * (self.narrow + draw)

    def lmdeploy(self, room: int, cache_share: float, tokens: int, decoding: Decoding) -> Bytes:
        """The most while LMDeploy samples so many tokens at once, started where there was `room`.

        While the model learns its weights are on the CPU, and its keys and values gone.
        """
        weights = 2 * self.model.parameters
        resident = self.resident()
        free = room - resident["parameters"] - resident["merged weights"] - resident["reference model"] - weights
        cache = max(0, int(cache_share * free))
        return resident | {"engine's weights": weights, "KV cache": cache, "sampling": self.drawing(tokens, decoding)}
