"""The kernels of a rollout and of a training step: which take the GPU's time, and how much of the time it is busy.

python -m benchmarks.gpu.kernels [toy|1.7B|8B] [batch …]
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.sampler import prompts
from benchmarks.gpu.shapes import DEVICE, DTYPE, machine, random_model, row, table, wait
from benchmarks.gpu.training import packed_demonstrations, packed_loss
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding

MOST = 15
NEW = 32 if DEVICE == "cuda" else 8


def main(shape: str = "1.7B", *batches: str) -> None:
    print(
        f"{machine()}. {shape}, {DTYPE}; the {MOST} kernels that take most; busy: the kernels' share of the wall time"
    )
    lm = random_model(shape, "sdpa")
    decoding = Decoding(strategy="low_confidence_static", denoising_steps=4, max_new_tokens=NEW)
    for batch in map(int, batches or ("1", "32", "128")):
        work = partial(NativeSampler(lm, batch).sample, prompts(batch, 4 * NEW), 1, decoding)
        profiled(f"native sampler, batch {batch}, {NEW} tokens an answer, S = 4", work)
    profiled(
        "fine-tuning step, layers neither compiled nor checkpointed, no optimizer",
        training(random_model(shape, attention())),
    )


def attention() -> str:
    return "flex_attention" if DEVICE == "cuda" else "sdpa"


def training(lm: DiffusionLM) -> Callable[[], object]:
    rows, answers = packed_demonstrations(lm)
    return lambda: packed_loss(lm, rows, answers)


def profiled(name: str, work: Callable[[], object]) -> None:
    """A table of the kernels of one run, after two that compile and capture."""
    work()
    work()
    wait()
    on_gpu = DEVICE == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        work()
        wait()
        wall = time.perf_counter() - start

    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = [event for event in found.key_averages() if event.device_type == device]
    busy = sum(took(event) for event in kernels) / 1e6
    launches = sum(event.count for event in kernels)
    print(f"\n{name}: {1000 * wall:.1f} ms under the profiler, busy {100 * busy / wall:.0f} %, {launches:,} kernels")
    table("kernel", "calls", "ms", "of the busy time")
    for event in sorted(kernels, key=took, reverse=True)[:MOST]:
        share = f"{took(event) / 1e4 / busy:.1f} %"
        row(event.key[:90].replace("|", "/"), f"{event.count:,}", f"{took(event) / 1000:.2f}", share)


def took(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
    """Microseconds on the device, of this kernel alone."""
    return event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total


if __name__ == "__main__":
    main(*sys.argv[1:])
