"""From a command line to running commands: Hydra composes each job's config, its run directory is opened, it starts."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirl_cli import overrides, schema, tree
from dirl_cli.errors import DirlError
from dirl_cli.explain import explain
from dirl_cli.rundir import open_run
from dirl_cli.worker import FAILURE

READ_ONLY = ("dry_run", "compare")  # keys that make a command look and tell: it opens no run directory


def launch(name: str, flags: Sequence[str], words: Sequence[str], config_dir: Path | None = None) -> None:
    """Compose conf/`name`.yaml with the overrides in `words` and run the command on it, once per sweep point.

    flags: Hydra's own, such as --multirun. config_dir: the user's config tree, which wins over ours.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine 6-fold
    tree.prepare(config_dir)
    may_sweep = flags in ([], ["--multirun"]) and name != "download"
    spelled = overrides.spell_out(words, tree.each) if may_sweep else list(words)
    short = dict(zip(spelled, words, strict=True))
    if spelled != list(words):
        flags, words = ["--multirun"], spelled
    sweep = "--multirun" in flags
    words = overrides.rewrite(words, tree.choices, sweep)
    words = overrides.choose_files(words, lambda key: tree.has(name, words, key))
    fixed = [] if not sweep else overrides.fixed_keys(words)
    title = schema.slug(",".join(short.get(word, word) for word in words if word.partition("=")[0] not in fixed))
    ledger = Path("runs", name, f".sweep-{os.getpid()}").absolute()  # a file, since jobs may be other processes
    ledger.unlink(missing_ok=True)  # of a sweep that was killed
    failed: list[DirlError] = []

    def task(cfg: DictConfig) -> None:
        try:
            start(name, cfg, fixed, ledger)
        except DirlError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"dirl {name}: {error}", file=sys.stderr)
                raise  # the launcher, perhaps in another process, marks the job as failed and goes on
            failed.append(error)

    sys.argv = [f"dirl {name}", *flags, *words, f"hydra.job.name={name}"]
    sys.excepthook = report_bug
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of reporting by itself
    try:
        hydra.main(config_path=str(tree.conf_dir()), config_name=name, version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise DirlError(explain(error, name, words)) from error
    except DirlError as error:
        sum_up(name, title, ledger)
        raise DirlError("the sweep is over, and not every run of it succeeded") from error
    if failed:
        raise failed[0]
    if sweep:
        sum_up(name, title, ledger)


def start(name: str, cfg: DictConfig, fixed: Sequence[str], ledger: Path) -> None:
    """Run a command on a composed config.

    fixed: the keys that do not tell a sweep's jobs apart. ledger: where a job of a sweep notes that it is done.
    """
    if missing := [key for key, value in tree.leaves(OmegaConf.to_container(cfg)) if value == "???"]:
        raise DirlError(f"give a value for {' and '.join(missing)}, such as {missing[0]}=…")
    unresolved = OmegaConf.to_container(cfg)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise DirlError(explain(error, name, [])) from error
    out = Path(cfg.out) if "out" in cfg else None
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        job = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] not in fixed]
        out = out and out / schema.slug(",".join(word for word in job if not is_told(unresolved, word)))
        print(f"dirl {name} {' '.join(job)}", *(["→", out] if out else []), flush=True)
    if out:
        cfg.out = str(out)
    writes = out and "resume" in cfg and not any(cfg.get(key) for key in READ_ONLY)
    with open_run(out, cfg, cfg.resume) if out and writes else nullcontext() as lock:
        if out and lock and cfg.gpus > 1:
            start_processes(name, cfg, out, lock.fileno())
        else:
            import_module(f"dirl_cli.commands.{name}").run(cfg, out)
    if writes and HydraConfig.get().mode == RunMode.MULTIRUN:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a") as lines:
            lines.write(json.dumps([HydraConfig.get().job.num, job, str(out)]) + "\n")


def is_told(unresolved: Any, word: str) -> bool:
    """Whether the run's name tells the choice of an override, as tiny-arithmetic does for bench=arithmetic."""
    group, _, choice = word.partition("=")
    name, out = unresolved.get("name", ""), unresolved.get("out", "")
    return "${name}" in out and f"${{{group}.name}}" in name and unresolved[group]["name"] == choice


def sum_up(name: str, title: str, ledger: Path) -> None:
    """End a sweep with the command's own `after_sweep`, if it has one. title: the sweep as the name of a file."""
    done = sorted(map(json.loads, ledger.read_text().splitlines())) if ledger.exists() else []
    ledger.unlink(missing_ok=True)
    if done and hasattr(command := import_module(f"dirl_cli.commands.{name}"), "after_sweep"):
        command.after_sweep(title, [(job, Path(out)) for _, job, out in done])


def start_processes(name: str, cfg: DictConfig, out: Path, lock: int) -> None:
    """Run a command in one process per GPU (or CPU share); each reads the config saved in `out`.

    lock: a file descriptor that keeps `out` theirs even if this process is killed.
    """
    from accelerate.utils import is_cuda_available

    on_cpu = cfg.device == "cpu" or not is_cuda_available()
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}
    failure = out / FAILURE
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dirl_cli.worker", "start", str(cfg.gpus), name, str(out)]
    # In a session of its own it does not see Ctrl-C, which would reach every process twice.
    with subprocess.Popen(command, env=environment, pass_fds=[lock], start_new_session=True) as launcher:
        try:
            launcher.wait()
        except KeyboardInterrupt:
            launcher.terminate()  # which they take as a wish to stop
            launcher.wait()
            raise
    if launcher.returncode:
        reason = failure.read_text() if failure.exists() else "a process failed, for the reason above"
        failure.unlink(missing_ok=True)
        raise DirlError(reason)


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without the frames of Typer and Hydra that lead to the command."""
    frame = start = trace
    while frame:
        if frame.tb_frame.f_code.co_filename == __file__:
            start = frame
        frame = frame.tb_next
    traceback.print_exception(kind, error, start)
