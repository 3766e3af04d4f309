"""How often a draw changes when only the order of a sum does, and what a draw costs.

python -m benchmarks.draws [models/SmolLM2-135M-Instruct GSM8K.json]        # about ten minutes on one core

The same model computes the same states twice in bf16, once with each product's sum in one piece and once in four, as
kernels for batches of other sizes add up: logits differ by rounding and by nothing else. Then three ways of drawing
take a token from both with the same randomness. No way can change fewer draws, on average over its randomness, than the
total variation distance of the two distributions.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.shapes import SHAPES
from dirl_cli.diffusion.sampling import draw_seed, entropy, exponential, race, truncated
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM

STATES, REPEATS = 32, 5
DRAWS = {"cumulative sum": 64, "Gumbel, V numbers": 8, "race of chunks": 64}  # of each state
VOCABULARY = 151_936


def by_inversion(logprobs: Tensor, seeds: Tensor) -> Tensor:
    """The token at which the cumulative sum, in fp64, passes a uniform number: how it was drawn before."""
    cumulative = logprobs.double().exp_().cumsum_(-1)
    uniform = 1 - (-exponential(seeds, torch.tensor(0))).exp()
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


def by_gumbel(logprobs: Tensor, seeds: Tensor) -> Tensor:
    """The largest logit with noise, of a number for each token of the vocabulary."""
    return (logprobs.exp() / exponential(seeds[:, None], torch.arange(logprobs.shape[1]))).argmax(-1)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cumulative sum": by_inversion,
    "Gumbel, V numbers": by_gumbel,
    "race of chunks": race,
}


class Split(nn.Module):
    """A linear layer in bf16 whose sum is made of `pieces`, each in fp32, rounded once at its end."""

    def __init__(self, layer: nn.Linear, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = bias
        self.pieces = 1

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.chunk(self.pieces, -1), self.weight.chunk(self.pieces, -1), strict=True)
        total = sum(part.float() @ weight.float().T for part, weight in parts)
        return (total if self.bias is None else total + self.bias).to(x.dtype)


def split_products(model: Any) -> list[Split]:
    """Put a `Split` in the place of each linear layer."""
    splits = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                splits.append(Split(child))
                setattr(module, name, splits[-1])
    return splits


@torch.inference_mode()
def twice(model: Any, rows: Tensor, place: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Logits (STATES, V) of the states at `place` of the rows, from sums in one piece and in four."""
    splits = split_products(model)
    head = model.get_output_embeddings()
    head.bias = bias
    logits = []
    for pieces in (1, 4):
        for split in splits:
            split.pieces = pieces
        hidden = model.get_decoder()(rows).last_hidden_state.flatten(0, 1)[place]
        logits.append(head(hidden).float())
    return logits


def of_text(path: str, text: str) -> list[Tensor]:
    """Of a model in a directory, at places of a text."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = torch.tensor(tokenizer(text).input_ids[: 8 * 128]).view(8, 128)
    place = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0))[:STATES]
    return twice(model, rows, place)


def random(is_peaked: bool) -> list[Tensor]:
    """A random model of the published vocabulary; is_peaked: the logits are doubled and follow Zipf's law besides."""
    _, _, heads, _ = SHAPES["1.7B"]
    config = SDARConfig(vocab_size=VOCABULARY, hidden_size=1024, num_hidden_layers=4, num_attention_heads=heads,
                        num_key_value_heads=8, head_dim=64, intermediate_size=3072)  # fmt: skip
    torch.manual_seed(0)
    model = SDARForCausalLM(config).bfloat16().eval()
    bias = None
    if is_peaked:
        model.get_output_embeddings().weight.data *= 2
        bias = -1.1 * torch.randperm(VOCABULARY).add(1).log()
    rows = torch.randint(0, VOCABULARY, (4, 64))
    return twice(model, rows, torch.arange(0, 256, 256 // STATES), bias)


def count(title: str, logits: list[Tensor], top_k: int) -> None:
    """Print how many draws in a hundred differ between the two logits, at temperature 1."""
    one, other = (truncated(each.log_softmax(-1), top_k, 1.0) for each in logits)
    distance = (one.double().exp() - other.double().exp()).abs().sum(-1).mean().item() / 2
    nats = entropy(one).mean().item()

    cells = []
    for name, way in WAYS.items():
        changed = 0
        for draw in range(DRAWS[name]):
            seeds = draw_seed(torch.arange(STATES), torch.tensor(draw), torch.tensor(1))
            changed += int((way(one, seeds) != way(other, seeds)).sum())
        cells.append(f"{100 * changed / STATES / DRAWS[name]:.2f}")
    cut = f", top-k {top_k}" if top_k else ""
    print(f"| {title}{cut} | {nats:.2f} | {100 * distance:.2f} | {' | '.join(cells)} |", flush=True)


def cost(vocabulary: int, rows: int) -> None:
    """Print the CPU milliseconds of a draw for each of some rows, and of the log-softmax before it."""
    logits = 3 * torch.randn(rows, vocabulary)
    seeds = draw_seed(torch.arange(rows), torch.tensor(0), torch.tensor(1))
    sides: list[Callable[[], object]] = [lambda: logits.log_softmax(-1)]
    logprobs = logits.log_softmax(-1)
    sides += [lambda way=way: way(logprobs, seeds) for way in WAYS.values()]  # type: ignore[misc]
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(REPEATS):
        for side, collected in zip(sides, times, strict=True):
            calls = max(100_000 // logits.numel(), 1)
            start = time.process_time()
            for _ in range(calls):
                side()
            collected.append(1000 * (time.process_time() - start) / calls)
    print(f"| {vocabulary:,} | {rows} | {' | '.join(f'{statistics.median(each):.3f}' for each in times)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    names = " | ".join(WAYS)
    dashes = "--:|" * len(WAYS)
    print(f"{STATES} states, draws of each: {DRAWS}\n")
    print(f"| logits | entropy, nats | least possible % | {names} |\n|---|--:|--:|{dashes}")
    models = {"random, nearly uniform": random(False), "random, peaked by Zipf's law": random(True)}
    if len(sys.argv) > 2:
        problems = [row["question"] for row in json.loads(Path(sys.argv[2]).read_text())[:40]]
        models[f"{Path(sys.argv[1]).name} on {Path(sys.argv[2]).stem}"] = of_text(sys.argv[1], "\n\n".join(problems))
    for title, logits in models.items():
        for top_k in (0, 50):
            count(title, logits, top_k)

    print(f"\n| V | rows | log-softmax, ms | {names} |\n|--:|--:|--:|{dashes}")
    for vocabulary in (335, 49_152, VOCABULARY):
        for rows in (1, 64):
            cost(vocabulary, rows)


if __name__ == "__main__":
    main()
