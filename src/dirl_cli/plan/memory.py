"""What a run will hold in memory, part by part, from the model's configuration alone.

Activations are what one of transformers' Qwen3 layers leaves to backpropagation, counted from its code; that the sums
are those measured on a CPU is seen in `tests/plan/test_plan.py` and `benchmarks/plan.py`. What differs on a GPU
(attention=flex) is counted from code alike, but no GPU has confirmed it. Compiled layers keep less, and are counted as
if they were not compiled.

All sizes are bytes. Factors of 4 and 2 are the bytes of a number in fp32 and bf16, and `self.value` is whichever of the
two the forward computes in; other factors count tensors of one shape, which the comment beside them names.
"""

import math
from dataclasses import dataclass, replace

import torch

from dirl_cli.diffusion.layout import Strip
from dirl_cli.models.attention import DENSE_TOKENS
from dirl_cli.models.attention_cpu import QUERIES
from dirl_cli.plan.architecture import Architecture
from dirl_cli.rollout.forward_gpu import PREFILL, page_size
from dirl_cli.rollout.products import Products, is_reordered
from dirl_cli.text import counted
from dirl_cli.training.layers import Checkpointing
from dirl_cli.training.logprobs import tokens_at_once
from dirl_cli.types import SHARDED_LAUNCHES, Decoding

Bytes = dict[str, int]
"""Bytes by part, such as `parameters`."""
# Bytes per logit of a chunk. In fp32: tempered, exp.
SCORING = 2 * 4
# And while entropies are learned from: log-probs, the entropy's gradient, its logarithms.
LEARNING_ENTROPY = 3 * 4
# Truncated by top-k, while its entropy is taken: truncated, with the target's own, log-prob, exp, clamped, two masks.
TRUNCATING = 5 * 4 + 2
# While top-p sorts them: tempered, sorted, their order as int64, their softmax and its sums, two masks.
SORTING = 5 * 4 + 8 + 2
# What top-k leaves of them before that, and its mask.
TOP_K_FIRST = 4 + 1


def logit_bytes(decoding: Decoding) -> int:
    """Bytes that scoring holds of each logit, in the softmax that tokens were drawn from."""
    if not decoding.truncates:
        return SCORING
    if decoding.top_p == 1:
        return TRUNCATING
    if decoding.top_k > 0:
        return SORTING + TOP_K_FIRST
    return SORTING


def to_whole_blocks(tokens: int, block_size: int) -> int:
    """The least multiple of `block_size` that is not below `tokens`."""
    return math.ceil(tokens / block_size) * block_size


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
    """The largest micro-batch of a step on as many tokens as `strips` times this strip, the longest, has.

    row_tokens: tokens that a row is packed to, unless one strip is longer. micro_rows: rows of a micro-batch; None for
    all that a process has. processes: those that have micro-batches of their own; a group that divides rows is one.
    """
    tokens = math.ceil(strips * len(strip))
    width = max(len(strip), min(row_tokens, tokens))
    rows_of_process = math.ceil(math.ceil(tokens / width) / processes)
    rows = min(micro_rows or rows_of_process, rows_of_process)
    scored = math.ceil(rows * width * len(strip.target_index) / len(strip))
    return MicroBatch(rows, width, scored, tokens)


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
    if launch in SHARDED_LAUNCHES:
        return Parallelism(processes, processes, processes, gathers=True, keeps_gathered=launch == "zero2")
    return Parallelism(gradients_stay=processes > 1)


@dataclass(frozen=True)
class Memory:
    """Bytes on each process's device, by part, in the phases of a run.

    bf16: whether the forward is autocast. dense: whether attention takes a dense mask (sdpa). tiled: whether it takes
    tiles, and a dense mask in short rows; else it takes coordinates (flex).
    reference: whether a model to stay near is there. reference_moves: whether it follows the policy. teacher: the
    parameters of another model that it is; 0 where it is what the policy began as. critic: whether a second model
    learns values, with AdamW.
    samples: whether a sampler is there. copy_stays: whether its own copy of the weights does during an update.
    products: what the native engine multiplies with on a CPU. cuda: whether the device is a GPU. context: processes
    that divide each row among them.
    """

    model: Architecture
    bf16: bool
    dense: bool
    tiled: bool = False
    checkpointing: Checkpointing = False
    reference: bool = False
    reference_moves: bool = False
    teacher: int = 0
    critic: bool = False
    samples: bool = False
    copy_stays: bool = False
    products: Products = "auto"
    cuda: bool = False
    parallelism: Parallelism = Parallelism()
    context: int = 1

    def __str__(self) -> str:
        model = self.model
        parameters = f"{model.parameters:,} parameters, {model.vocabulary_parameters:,} of them in embedding and head"
        if model.trained and not model.is_full_finetune:
            parameters += f"; {model.trained:,} trained beside them"

        kind = "bf16" if self.bf16 else "fp32"  # of the forward
        if self.bf16 and model.is_full_finetune:
            kind += " with weights in fp32"
        attention = "FlexAttention"
        if self.dense:
            attention = "a dense attention mask"
        elif self.tiled:
            attention = "attention by tiles"
        return f"{parameters}; {kind}; {attention}"

    @property
    def value(self) -> int:
        """Bytes of a number that autocast casts to bf16, if the forward is autocast."""
        return 2 if self.bf16 else 4

    @property
    def casts_weights(self) -> bool:
        """Whether a forward needs bf16 copies of weights that are kept in fp32, because they are trained."""
        return self.bf16 and self.model.is_full_finetune

    # What every phase holds

    def resident(self) -> Bytes:
        """Bytes that every phase holds."""
        # All parts are named, also those of which there is nothing: phases and their table have one order.
        sizes = {
            "parameters": self.model.weight_bytes // self.parallelism.parameters + self.model.scale_bytes,
            "merged weights": 0,
            "sampler's copy": 0,
            "gradients": 0,
            "optimizer states": self.model.state_bytes // self.parallelism.states,
            "reference model": 0,
            "critic": 0,
        }
        if self.samples and not self.parallelism.gathers:  # whose sampler has a copy of the whole
            sizes["merged weights"] = self.model.merged_bytes
        if self.copy_stays:
            sizes["sampler's copy"] = self.sampler_copy()
        if self.parallelism.gradients_stay:
            sizes["gradients"] = self.gradients()
        sizes["reference model"] = self.reference_bytes() // self.parallelism.parameters
        if self.critic:  # its weights and the two states of each; its own update holds less than the policy's
            sizes["critic"] = 4 * self.critic_parameters() // self.parallelism.parameters
            sizes["critic"] += 2 * 4 * self.critic_parameters() // self.parallelism.states
            if self.parallelism.gradients_stay:
                sizes["critic"] += 4 * self.critic_parameters()
        return sizes

    def reference_bytes(self) -> int:
        """Bytes of a model to stay near, of which processes that share the policy have a part each."""
        if self.teacher:
            return self.value * self.teacher
        if self.reference and self.model.is_full_finetune:
            return 4 * self.model.parameters
        # An adapter's is the model without it, where that moves or processes share it a copy of it.
        if self.reference_moves or (self.reference and self.parallelism.gathers):
            return self.value * self.model.parameters
        return 0

    def critic_parameters(self) -> int:
        """The number of parameters of a second model that has no language-model head, and a value for each state."""
        model = self.model
        return model.layer_parameters + model.vocabulary * model.hidden + model.hidden

    def gradients(self) -> int:
        """Bytes of this process's gradients."""
        return 4 * self.model.trained // self.parallelism.gradients

    def sampler_copy(self) -> int:
        """Bytes of the sampler's own copy of the weights, where it cannot use those that are trained."""
        copy = 4 * self.model.parameters
        if self.parallelism.gathers and not self.model.is_full_finetune:
            copy = self.value * self.model.parameters
        if self.parallelism.gathers:  # a copy that is gathered from the processes has its linear layers cast at once
            copy -= self.linear_copies()
        return copy

    def linear_copies(self) -> int:
        """Bytes of bf16 copies of all fp32 linear weights, the head's among them."""
        if not self.casts_weights:
            return 0
        return 2 * (self.model.layer_parameters + self.model.vocabulary * self.model.hidden)

    def loading(self) -> Bytes:
        """Bytes of the first process while it loads a model that processes share, and sends the others their parts.

        Embedding and head are whole until training begins, a layer until it is cut, a tensor while it is sent.
        """
        model = self.model
        number = 4 if model.is_full_finetune else self.value  # bytes of a parameter that is not packed
        ends = number * model.vocabulary_parameters
        layers = model.weight_bytes - ends
        return {
            "parameters": layers // self.parallelism.parameters + ends + model.scale_bytes,
            "gathered": max(layers // model.layers, number * model.vocabulary * model.hidden),
            "loaded model": 0 if self.cuda else self.loaded(),  # beside a GPU, which never has it
        }

    def loaded(self) -> int:
        """Bytes of the whole model as the first process loads it, before its weights are packed."""
        return max(self.model.weight_bytes, self.value * self.model.parameters)

    # An update

    def update(self, batch: MicroBatch, scoring: int = SCORING) -> Bytes:
        """Bytes at the peak of learning from several such micro-batches.

        scoring: bytes of each logit that is scored.
        """
        if self.tiled and batch.width <= DENSE_TOKENS:
            return replace(self, dense=True, tiled=False).update(batch, scoring)
        tokens = math.ceil(batch.rows * batch.width / self.context)
        activations = self.activations(tokens, batch.width)

        # Backpropagation begins at the head, with logits, and goes on through layers, with the gradients inside one:
        # the peak is where more is held.
        at_head = {
            "bf16 copies": self.copies_at_head(),
            "activations": activations,
            "logits": self.logits(batch.scored, scoring),  # a slice may hold all scored tokens
        }
        in_layer = {
            "bf16 copies": self.copies_in_layers(),
            "activations": activations + self.inside_layer(tokens),
        }
        peak = max(at_head, in_layer, key=lambda sizes: sum(sizes.values()))
        return self.resident() | {"gradients": self.gradients(), "gathered": self.gathered()} | peak

    def activations(self, tokens: int, width: int) -> int:
        """Bytes kept for backpropagation by a forward of so many tokens of this process, in rows of `width`."""
        # the hidden states between layers, in fp32 where the embedding is
        number = 4 if self.model.is_full_finetune else self.value
        between = number * self.model.hidden * tokens
        of_layer = tokens * self.layer()
        if self.checkpointing:  # a layer keeps what comes in, and computes the rest again
            of_layer = between
        if self.checkpointing == "attention":  # all but what comes out of attention; its sums are small
            of_layer += tokens * self.value * self.model.queries
        mask = 0  # of whole rows, also where each process has a slice of them
        if self.dense:  # a row's tokens by its tokens
            mask = self.value * tokens * self.context * width
        elif self.tiled:  # by the keys that not all of a tile see: the tile itself, and about as many before it
            mask = self.value * tokens * self.context * 2 * QUERIES
        return self.model.layers * of_layer + 2 * between + mask

    def layer(self) -> int:
        """Bytes of one token that a layer keeps for backpropagation."""
        model = self.model
        value = self.value

        # both norms: what comes in and, where their weights are trained, what is normalised, in fp32
        norms = 2 * 4 * model.hidden
        # queries and keys before their norms, in fp32
        heads = 4 * (model.queries + model.keys)
        if model.is_full_finetune:
            norms *= 2
            heads += value * (model.queries + model.keys)

        # what goes from the norms to five linear layers, each of which casts it for itself under autocast
        linear_inputs = 2 * 4 * model.hidden
        if self.bf16:
            linear_inputs = 5 * 2 * model.hidden
            if not model.is_full_finetune:  # to the output projection's factors, cast up by PEFT and down again
                linear_inputs += value * model.queries

        # rotated queries, keys, values, what comes out; under a dense mask keys and values stand once per query head
        attention = value * (2 * model.queries + 2 * model.keys)
        if self.dense:
            attention = value * 4 * model.queries
        if self.context > 1:  # what comes out also as it has travelled back
            attention += value * model.queries
        # gate, up, silu(gate) and their product; an expert's tokens are gathered, and weighted afterwards
        mlp = value * (4 * model.inner + 2 * model.experts * model.hidden)
        return norms + heads + linear_inputs + attention + mlp

    def inside_layer(self, tokens: int) -> int:
        """Bytes that backpropagation through one layer adds: gradients in its MLP, and what is computed again."""
        gradients = 2 * self.value * self.model.inner * tokens
        if self.checkpointing:
            return gradients + tokens * self.layer()
        return gradients

    def logits(self, scored: int, scoring: int) -> int:
        """Bytes of a chunk of logits, or of their gradients. scored: tokens of the micro-batch that have logits."""
        chunk = min(scored, tokens_at_once(self.model.vocabulary))
        if not self.model.is_full_finetune:
            return self.model.vocabulary * scoring * chunk

        # the head's gradient is whole before it is added to that of earlier tokens, and in bf16 a chunk's part of it
        of_chunk = 4 * chunk
        if self.bf16:
            of_chunk = max(6 * chunk, 2 * (self.model.hidden + chunk))
        return self.model.vocabulary * max(scoring * chunk, 4 * self.model.hidden + of_chunk)

    def copies_at_head(self) -> int:
        """Bytes of the bf16 copies of weights that autocast holds at the end of a forward."""
        if not self.parallelism.gathers:
            return self.linear_copies()
        if not self.bf16:
            return 0
        return 2 * self.model.vocabulary * self.model.hidden  # the head's; those of gathered layers are not kept

    def copies_in_layers(self) -> int:
        """Bytes of the bf16 copies that are held while the deepest layer is backpropagated: of all layers, or of it."""
        if not self.casts_weights:
            return 0
        copies = 2 * self.model.layer_parameters
        if self.checkpointing or self.parallelism.gathers:
            return copies // self.model.layers
        return copies

    def gathered(self) -> int:
        """Bytes of parameters and gradients that a process has gathered from the others at a time."""
        if not self.parallelism.gathers:
            return 0
        # FSDP2 gathers the next layer while it computes one, and both layers' gradients are whole until reduced.
        two_layers = 2 * self.model.layer_parameters // self.model.layers
        gradients = parameters = self.model.vocabulary_parameters + two_layers
        number = 4  # bytes
        if not self.model.is_full_finetune:
            gradients = 2 * self.model.trained // self.model.layers
            number = self.value
        if self.parallelism.keeps_gathered:
            parameters = self.model.parameters
        return 4 * gradients + number * parameters

    # Sampling

    def rollout(
        self,
        slots: int,
        prompt: int,
        longest: int,
        block_size: int,
        decoding: Decoding,
        free_bytes: float = math.inf,
        cache_share: float = 1.0,
    ) -> Bytes:
        """Bytes at the peak of sampling with the native engine.

        slots: answers at once. prompt: tokens of the longest prompt. longest: also of its answer. free_bytes: before
        there is anything of the run. cache_share: on a GPU, of what is left of them, the part for keys and values.
        """
        model = self.model
        length = to_whole_blocks(longest, block_size)
        entering = prompt + block_size
        # Of a token that enters, beside the residual stream: the MLP, or queries and keys normed and rotated in fp32.
        stream = 12 * model.hidden
        mlp = 4 * model.hidden + 3 * self.value * model.inner
        rotating = self.value * (model.queries + 2 * model.keys) + 8 * (model.queries + model.keys)

        if self.cuda:  # some prompts at a time, keys and values read where they are
            prefill = min(slots * entering, PREFILL) * (stream + max(mlp, rotating))
            busiest = max(prefill, self.drawing(slots * block_size, decoding))
        else:
            # with a token's row of the mask, which attention makes numbers of
            attending = self.value * (3 * model.queries + model.keys + entering)
            prefill = entering * (stream + max(mlp, rotating, attending) + entering)
            attention = 8 * length * model.queries  # keys and values once per query head, all that are cached
            busiest = slots * max(prefill, attention, self.drawing(block_size, decoding))

        # A sampler keeps casts of the linear weights, instead of casting in every forward.
        sampler_copy = copies = 0
        if self.parallelism.gathers or self.copy_stays:
            sampler_copy = self.sampler_copy()
        if not self.parallelism.gathers:
            copies = self.linear_copies()
        parts = self.resident() | {
            "sampler's copy": sampler_copy,
            "bf16 copies": copies,
            "reordered weights": 0 if self.cuda else self.reordered_weights(),
        }
        held = sum(parts.values())
        if self.copy_stays:  # the sampler takes its share before anything has been learned, and keeps it
            held -= parts["optimizer states"] + parts["gradients"]
        room = cache_share * (free_bytes - held)
        return parts | {"KV cache": self.kv_cache(slots, length, block_size, room), "sampling": busiest}

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return self.model.layers * 2 * self.model.keys * self.value

    def kv_cache(self, slots: int, length: int, block_size: int, room: float) -> int:
        """Bytes of keys and values: on a CPU of all slots, on a GPU in as many pages as there is room for.

        length: tokens of the longest sequence, which has its pages in any case. room: bytes.
        """
        if not self.cuda:
            return slots * length * self.token_bytes
        size = page_size(block_size)
        longest = math.ceil(length / size)
        pages = slots * longest + 1  # one to spare
        if room < pages * size * self.token_bytes:
            pages = max(int(room // (size * self.token_bytes)), longest + 1)
        return pages * size * self.token_bytes

    def reordered_weights(self) -> int:
        """Bytes of the copies that a sampler on a CPU multiplies with, of the weights that are large enough."""
        model = self.model
        sizes = [model.hidden * (model.queries + 2 * model.keys), model.queries * model.hidden]
        if not model.experts:  # which are computed as they are
            sizes += [2 * model.hidden * model.inner, model.inner * model.hidden]
        sizes = sizes * model.layers + [model.vocabulary * model.hidden]
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return self.value * sum(size for size in sizes if is_reordered(size, dtype, self.products))

    def drawing(self, tokens: int, decoding: Decoding) -> int:
        """Bytes at the peak of drawing so many tokens from their logits."""
        if self.cuda and not decoding.truncates:
            scratch = 0  # one pass over the logits
        elif decoding.temperature == 0:
            scratch = 8
        else:
            scratch = 16  # per logit: itself in fp32, its log-prob, its probability, and that with whole chunks
            if decoding.top_k > 0:
                scratch += 4
            if decoding.top_p < 1:
                scratch += 12  # sorted, the order, sums
        return tokens * self.model.vocabulary * (self.value + scratch)

    def lmdeploy(self, free_bytes: int, cache_share: float, tokens: int, decoding: Decoding) -> Bytes:
        """Bytes at the peak while LMDeploy samples so many tokens at once, started where `free_bytes` were free.

        While the model learns, its weights are on the CPU, and its keys and values gone.
        cache_share: of what weights leave free, the part for keys and values.
        """
        weights = 2 * self.model.parameters
        resident = self.resident()
        held = (
            resident["parameters"]
            + resident["merged weights"]
            + resident["reference model"]
            + resident["critic"]
            + weights
        )
        cache = max(0, int(cache_share * (free_bytes - held)))
        return resident | {"engine's weights": weights, "KV cache": cache, "sampling": self.drawing(tokens, decoding)}
