"""Steps of fine-tuning with layers compiled and not, in turn: what compiling takes, and what a step then does.

python -m benchmarks.compiled tiny|larger|DIRECTORY [SECONDS]     # of a causal model, which `dirl download` made
"""

import sys
import time
from statistics import median

import torch

from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.models.from_causal import FromCausal
from dirl_cli.models.load import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.models.tiny import Tiny
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.layers import compile_layers, compile_seconds
from dirl_cli.training.logprobs import LogprobModel

LENGTHS = {"tiny": (40, 60, 80)}  # tokens of a demonstration, in turn
LONGER = (100, 200, 300)  # of any other model


def model_of(name: str) -> DiffusionLM:
    """The embedded model, a random one of 10.6 M parameters, or the one in a directory."""
    torch.manual_seed(0)
    if name == "tiny":
        return Tiny().load(device="cpu")
    if name != "larger":
        return FromCausal(name, name, block_size=4, logit_shift=True).load(device="cpu")
    config = SDARConfig(
        vocab_size=8192,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=64,
        intermediate_size=960,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return diffusion_lm(SDARForCausalLM(config), None, 4, 8191)


def seconds_of_step(scorer: LogprobModel, length: int, lm: DiffusionLM) -> float:
    """CPU seconds of a forward and backward of four demonstrations."""
    demonstrations = [example([2] * length, [place >= length // 2 for place in range(length)], 4, 0)] * 4
    rows, _ = Noise(PerBlock(), 4, lm.mask_token_id, 0, row_tokens=1024).rows(demonstrations, 0)
    start = time.process_time()
    cross_entropy(rows, *scorer(rows)[:2])["loss"].backward()
    return time.process_time() - start


def main(name: str, budget: float) -> None:
    """Alternate both until so many seconds are spent, and print medians."""
    lengths = LENGTHS.get(name, LONGER)
    models = {False: model_of(name), True: model_of(name)}
    compile_layers(models[True].model)
    scorers = {}
    for compiles, lm in models.items():
        scorers[compiles] = LogprobModel(lm.model)
        scorers[compiles].train()

    # The first step of a compiled model waits for its code; the others are what counts thereafter.
    first = {compiles: seconds_of_step(scorer, lengths[0], models[compiles]) for compiles, scorer in scorers.items()}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    end = time.monotonic() + budget
    while time.monotonic() < end:
        for length in lengths:
            for compiles, scorer in scorers.items():
                seconds[compiles].append(seconds_of_step(scorer, length, models[compiles]))
    plain, compiled = median(seconds[False]), median(seconds[True])
    parameters = sum(p.numel() for p in models[False].model.parameters())
    print(f"{name}: {parameters:,} parameters, {len(seconds[True])} steps each, lengths {lengths}")
    print(f"first step {first[False]:.2f} and {first[True]:.2f} CPU s, {compile_seconds():.1f} s of waiting for it")
    print(f"a step {plain:.4f} and {compiled:.4f} CPU s: {plain / compiled:.2f}x")
    if compiled < plain:
        print(f"pays after {first[True] / (plain - compiled):,.0f} steps")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 20)
