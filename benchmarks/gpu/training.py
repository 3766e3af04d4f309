"""Training steps: fine-tuning against the doubled layout, DiPO packed against the published expansion.

python -m benchmarks.gpu.training [toy|1.7B|8B] [answer buffer]
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from omegaconf import OmegaConf
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks import dipo_step
from benchmarks.gpu.shapes import (
    BLOCK,
    DEVICE,
    DTYPE,
    EXACT,
    FLOPS,
    MASK,
    REPOSITORY,
    body_and_head,
    machine,
    random_model,
    row,
    seconds,
    table,
)
from dirl_cli.cli.build import build
from dirl_cli.data.order import generator
from dirl_cli.diffusion.layout import Rows
from dirl_cli.diffusion.masking import Example, example
from dirl_cli.models.load import DiffusionLM
from dirl_cli.sft.batches import Noise
from dirl_cli.training.layers import checkpoint_layers, compile_layers
from dirl_cli.training.logprobs import LogprobModel
from tests.reference.expanded import doubled_mask

REPEATS = 5 if DEVICE == "cuda" else 1
LENGTHS = (700, 1100, 500, 900) if DEVICE == "cuda" else (40, 60)
MASKING = build(OmegaConf.load(REPOSITORY / "conf/masking/per_block.yaml"))
GOALS = (
    "Goals: fine-tuning 1.6× the doubled layout; DiPO 3× (full) and 8× (ragged) the expanded rows;"
    " 45 % of the device's FLOPs at 8B"
)


def main(shape: str = "1.7B", buffer: str = "766" if DEVICE == "cuda" else "30") -> None:
    lm = random_model(shape, "flex_attention" if DEVICE == "cuda" else "sdpa")
    for parameter in lm.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    print(f"{machine()}. {shape}, {DTYPE} weights and gradients, no optimizer step, median of {REPEATS}; GiB: the most"
          f" above weights and gradients; FLOPs: of the model alone, 6 a parameter and token. {GOALS}")  # fmt: skip
    table("step", "layers", "tokens", "seconds ± half the spread", "of the FLOPs", "GiB", "packed is faster by")
    whole = shape == "8B"
    if whole:  # of which the GPU could not keep every layer
        keep_less(lm)
    layers = "checkpointed" if whole else "as they are"
    rows, answers = packed_demonstrations(lm)
    slow = fine_tuning(lm, layers)
    compile_layers(lm.model, "inductor" if DEVICE == "cuda" else "eager")
    packed = partial(packed_loss, lm, rows, answers)
    report(lm, "fine-tuning, packed", f"{layers}, compiled", rows.num_tokens, len(rows.target_index), packed, slow)
    if not whole:
        keep_less(lm)
    dipo(lm, int(buffer), compare=not whole)


def keep_less(lm: DiffusionLM) -> None:
    checkpoint_layers(lm.model, True)
    lm.model.train()  # there is no dropout; only then transformers recomputes


def fine_tuning(lm: DiffusionLM, layers: str) -> float:
    """Four demonstrations, each with a masked copy of its answer: packed into a row, and each doubled by itself.

    Returns the seconds of the latter.
    """
    rows, answers = packed_demonstrations(lm)

    def packed() -> float:
        return packed_loss(lm, rows, answers)

    def doubled() -> float:
        random, total = generator(0), 0.0  # the masks of the packed rows
        for one in demonstrations(lm):
            loss = doubled_loss(lm, one, random) / answers
            loss.backward()
            total += loss.item()
        return total

    ours, theirs = packed(), doubled()
    assert abs(ours - theirs) < (1e-5 if EXACT else 2e-2) * theirs, f"losses: {ours} and {theirs}"
    slow = report(lm, "fine-tuning, doubled", layers, 2 * sum(LENGTHS), sum(LENGTHS), doubled)
    report(lm, "fine-tuning, packed", layers, rows.num_tokens, len(rows.target_index), packed, slow)
    return slow


def demonstrations(lm: DiffusionLM) -> list[Example]:
    """Four of random tokens, of which an eighth is the prompt."""
    numbers = torch.Generator().manual_seed(0)
    examples = []
    for length in LENGTHS:
        ids = torch.randint(4, 300, (length,), generator=numbers).tolist()
        examples.append(example(ids, [i >= length // 8 for i in range(length)], BLOCK, lm.pad_token_id))
    return examples


def packed_demonstrations(lm: DiffusionLM) -> tuple[Rows, int]:
    """Rows on the device, and the number of answers in them."""
    rows, answers = Noise(MASKING, BLOCK, MASK, lm.pad_token_id, 8192).rows(demonstrations(lm), 0)
    return rows.to(lm.device), answers


def packed_loss(lm: DiffusionLM, rows: Rows, answers: int) -> float:
    """Forward and backward of packed rows, as `dirl sft` has them."""
    logprobs, *_ = LogprobModel(lm.model).to(lm.device)(rows)
    loss = -(rows.weight * logprobs).sum() / answers
    loss.backward()
    return loss.item()


def doubled_loss(lm: DiffusionLM, one: Example, random: torch.Generator) -> torch.Tensor:
    """As published: noised and clean copy side by side under a dense mask, and the logits of the whole noised one."""
    hidden, weights = MASKING(one.trained.nonzero().squeeze(1) // BLOCK, random)
    masked, weight = torch.zeros_like(one.trained), torch.zeros(len(one.trained))
    masked[one.trained], weight[one.trained] = hidden[0], weights[0]
    ids, masked, weight = (tensor.to(lm.device) for tensor in (one.token_ids, masked, weight))
    length = len(ids)
    with dense_attention(lm.model):
        states = lm.model.get_decoder()(
            input_ids=torch.cat([ids.masked_fill(masked, MASK), ids])[None],
            position_ids=torch.arange(length, device=ids.device).repeat(2)[None],
            attention_mask=doubled_mask(length, BLOCK).to(ids.device)[None, None],
            use_cache=False,
        ).last_hidden_state[0, :length]
    losses = F.cross_entropy(lm.model.get_output_embeddings()(states).float(), ids, reduction="none")
    return (losses * weight * masked).sum()


@contextmanager
def dense_attention(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside take a dense mask, whatever attention the model was loaded with."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def dipo(lm: DiffusionLM, buffer: int, compare: bool) -> None:
    """A group of eight answers, which fill a buffer of so many tokens, and ragged ones."""
    dipo_step.BUFFER = buffer
    dipo_step.PROMPT, dipo_step.VOCABULARY, dipo_step.MASK = (126, 300, MASK) if DEVICE == "cuda" else (14, 300, MASK)
    row_tokens = 16384 if DEVICE == "cuda" else 256
    layers = "checkpointed, compiled"
    for name, make in dipo_step.CASES.items():
        case = make()
        scored = case.answer_tokens

        def expanded(case: dipo_step.Case = case) -> int:
            with torch.device(DEVICE), dense_attention(lm.model):
                return dipo_step.expanded(lm, case)

        packed = partial(dipo_step.packed, lm, case, row_tokens)
        if compare:
            ours, tokens = dipo_step.gradient(lm, lambda *_, packed=packed: packed(), case)
            theirs, many = dipo_step.gradient(lm, lambda *_, expanded=expanded: expanded(), case)
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            assert difference < (1e-5 if EXACT else 5e-2), f"gradients differ by {difference:.1e}"
            del ours, theirs
        else:
            tokens, many = packed(), expanded()
        slow = report(lm, f"DiPO {name}, expanded", layers, many, scored, expanded)
        report(lm, f"DiPO {name}, packed", layers, tokens, scored, packed, slow)


def report(
    lm: DiffusionLM,
    name: str,
    layers: str,
    tokens: int,
    scored: int,
    step: Callable[[], object],
    slow: float | None = None,
) -> float:
    """A row of the table; returns the seconds of a step. slow: those of what this one replaces."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    median, spread = seconds(step, REPEATS)
    peak = f"{(torch.cuda.max_memory_allocated() - held) / 2**30:.1f}" if DEVICE == "cuda" else "—"
    body, head = body_and_head(lm)
    used = 6 * (body * tokens + head * scored) / median / FLOPS
    faster = f"{slow / median:.1f}×" if slow else ""
    row(name, layers, f"{tokens:,}", f"{median:.3f} ± {spread / 2:.3f}", f"{100 * used:.0f} %", peak, faster)
    return median


if __name__ == "__main__":
    main(*sys.argv[1:])
