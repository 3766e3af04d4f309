"""Memory of two processes that load a model layer by layer (`launch=fsdp2`), beside two of which each loads all of it.

python -m benchmarks.sharded_loading    # a markdown table; two minutes of one core, 2 GB of memory and of disk
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from benchmarks.plan import MIB, memory
from dirl_cli.commands.start import load_on_device
from dirl_cli.models.load import DiffusionLM, SavedModel
from dirl_cli.models.peft import FullFinetune
from dirl_cli.models.sharded_tensors import is_sharded
from dirl_cli.plan.architecture import architecture
from dirl_cli.plan.memory import Memory, parallelism
from dirl_cli.training.export import save_model, save_sharded
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.trainer import Trainer
from tests.helpers.measured import ADAMW, Size
from tests.helpers.processes import run_together

LARGE = Size(hidden=768, layers=16, heads=12, key_heads=4, inner=2048, vocabulary=4096)
SMALL = Size(hidden=64, layers=2, heads=2, key_heads=1, inner=64, vocabulary=100, head_dim=32)
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAUNCHES = ("fsdp2", "cpu_gloo")
PROCESSES = 2
# memory that is freed goes back at once, so that what a process holds is what it uses
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@contextmanager
def watched(before: dict[str, int], found: list[list[int]]) -> Iterator[None]:
    """Append bytes beyond `before`: resident at the peak, the process's own at theirs, resident at the end.

    Its own are not pages of a file, which go where memory is short and of which processes share one copy. The kernel
    keeps no peak of them: a thread looks.
    """
    own: list[int] = []
    has_ended = Event()

    def look() -> None:
        while not has_ended.wait(0.005):
            own.append(memory("RssAnon"))

    looking = Thread(target=look)
    looking.start()
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    yield
    peak = memory("VmHWM")
    has_ended.set()
    looking.join()
    own.append(memory("RssAnon"))
    found.append([peak - before["VmRSS"], max(own) - before["RssAnon"], memory("VmRSS") - before["VmRSS"]])


def phases(directory: str, accelerator: Accelerator) -> list[list[int]]:
    """What `watched` finds while a model is loaded, wrapped for training, and written."""
    load = partial(FullFinetune().load, SavedModel("model", directory))
    cfg = OmegaConf.create({"dtype": "float32", "attention": "auto"})
    before = {field: memory(field) for field in ("VmRSS", "RssAnon")}
    found: list[list[int]] = []
    with watched(before, found):
        lm = load_on_device(cfg, load, accelerator)
    accelerator.wait_for_everyone()
    with watched(before, found):
        Trainer(accelerator, LogprobModel(lm.model), ADAMW.build(lm.model), lambda step: 1.0, clip_norm=1.0)
    accelerator.wait_for_everyone()
    with watched(before, found):
        write(lm, Path(directory) / "written", accelerator)
    return found


def write(lm: DiffusionLM, directory: Path, accelerator: Accelerator) -> None:
    """As a run writes its model when it ends."""
    if is_sharded(lm.model):
        save_sharded(lm, FullFinetune(), torch.float32, directory, "", accelerator)
    else:
        save_model(lm, torch.float32, directory, "", accelerator)


def measure(launch: str, small: str, large: str) -> None:
    """Print what one process of several holds."""
    accelerator = start_accelerator("cpu", "float32", launch)
    phases(small, accelerator)  # libraries set themselves up at their first use
    print(json.dumps(phases(large, accelerator)))


def describe(lm: DiffusionLM) -> str:
    """The model's size, and what a plan says that the first process holds while it loads it to be shared."""
    whole = sum(parameter.nbytes for parameter in lm.model.parameters())
    model = architecture(lm.model.config, ADAMW)
    plan = Memory(model, bf16=False, dense=False, parallelism=parallelism("fsdp2", PROCESSES)).loading()
    planned = ", ".join(f"{part} {count / MIB:,.0f}" for part, count in plan.items())
    return f"MiB: {whole / MIB:,.0f} the model, {whole / PROCESSES / MIB:,.0f} a shard; planned: {planned}\n"


def row(stored: str, launch: str, rank: int, printed: str) -> str:
    found = json.loads(printed.splitlines()[-1])
    cells = [f"{peak / MIB:,.0f} ({own / MIB:,.0f}) | {after / MIB:,.0f}" for peak, own, after in found]
    return f"| {stored} | {launch} | {rank} | {' | '.join(cells)} |"


def main() -> None:
    with TemporaryDirectory() as directory:
        small, large = f"{directory}/small", f"{directory}/large"
        SMALL.build().save(Path(small))
        lm = LARGE.build()
        print(describe(lm))
        print("| stored | launch | process | loading | after | wrapping | after | writing | after |")
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        for stored in STORED:
            lm.model.to(STORED[stored])
            lm.save(Path(large))
            for launch in LAUNCHES:
                words = [[launch, small, large]] * PROCESSES
                together = run_together("benchmarks.sharded_loading", words, seconds=300, **GIVES_BACK)
                for rank, printed in enumerate(together):
                    print(row(stored, launch, rank, printed), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
