"""A push of the trainer's weights into an engine on the same device: what moves, and how long it takes.

python -m benchmarks.gpu.push [toy|1.7B|8B]
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.shapes import BANDWIDTH, DEVICE, lmdeploy, machine, random_model, row, seconds, table, wait
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding

REPEATS = 5


class Copied(TorchDispatchMode):
    """Counts the bytes that copies write while it is entered."""

    bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if "copy" in operation.__name__:  # copy_, _to_copy, _foreach_copy_
            written = result if result is not None else args[0]
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves(written) if isinstance(tensor, Tensor))
        return result


def main(shape: str = "1.7B") -> None:
    print(f"{machine()}. {shape}, median of {REPEATS}. Goal: 0 bytes on one GPU")
    table("engine, trainer's weights", "bytes written", "ms ± half the spread", "of the bandwidth")
    lm = random_model(shape, "sdpa")
    push(f"native, {lm.model.dtype}", started(lm), lm)
    if DEVICE == "cuda" and find_spec("lmdeploy"):
        theirs = lmdeploy(lm, 8, 0.1)
        push(f"LMDeploy, {lm.model.dtype}", theirs, lm)
        once("LMDeploy falls asleep", theirs.sleep)
        once("… is given weights", lambda: theirs.update_weights(lm.model.named_parameters(), 2))
        once("… wakes up", theirs.wake)
    if shape != "8B":  # a trainer in fp32 would not fit beside it
        trained = random_model(shape, "sdpa", torch.float32)
        with torch.autocast(DEVICE, torch.bfloat16):
            push(f"native under bf16, {trained.model.dtype}", started(trained), trained)


def started(lm: DiffusionLM) -> Sampler:
    """A native engine that has sampled before."""
    sampler = NativeSampler(lm, 8)
    sampler.sample([[5] * 8], 1, Decoding(max_new_tokens=8))
    return sampler


def push(name: str, sampler: Sampler, lm: DiffusionLM) -> None:
    """A row: the trainer's parameters pushed again and again."""
    with Copied() as copied:
        sampler.update_weights(lm.model.named_parameters(), 1)
    median, spread = seconds(lambda: sampler.update_weights(lm.model.named_parameters(), 1), REPEATS)
    share = f"{100 * 2 * copied.bytes / median / BANDWIDTH:.0f} %"  # what is written was read
    row(name, f"{copied.bytes:,}", f"{1000 * median:.2f} ± {500 * spread:.2f}", share)


def once(name: str, work: Callable[[], None]) -> None:
    """A row of what a step of reinforcement does besides."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    row(name, "", f"{1000 * (time.perf_counter() - start):.0f}", "")


if __name__ == "__main__":
    main(*sys.argv[1:])
