"""A command in several processes: `start` runs Accelerate's launcher, which runs `run` of this file once per process.

`beside` runs a command that a run needs beside it, as the servers that it samples with.

No process composes a config of its own: each reads the one that the parent saved in the run directory. A launcher of
the user's own does the same with `-m dirl_cli.cli.worker COMMAND DIRECTORY`, once `prepare=true` has written that.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.run_dir import locked
from dirl_cli.console import replace_unencodable
from dirl_cli.errors import DirlError, Stopped, death
from dirl_cli.text import counted, redact

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in Linux's prctl.h
FAILURE = "failure.txt"  # in the run directory: the sentence of the process that failed first
NOTICE = 3  # seconds in which the launcher, which looks ten times a second, has seen that a process is gone
PATIENCE = 5  # seconds that the other processes are given when one has failed


def launch_workers(name: str, out: str, *options: str) -> None:
    """Run a command as Accelerate's `options` say; exit 1 when one of its processes fails."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    end_with_parent(signal.SIGTERM)
    # Processes that wait for a failed one, as on a GPU, hear no signal and have nothing to save: torch gives them 30 s.
    PContext.close.__defaults__ = (None, PATIENCE)

    script = ["-m", "dirl_cli.cli.worker", "run", name, out]
    logging.disable(logging.ERROR)  # a failed process tells its own reason
    try:
        launch_command(launch_command_parser().parse_args([*options, *script]))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0 and not Path(out, FAILURE).exists():
            killed = f"process {rank} {death(first.exitcode, 'give fewer gpus or a smaller batch')}"
            Path(out, FAILURE).write_text(json.dumps([killed, DirlError.exit_code]))
        sys.exit(1)
    except SignalException:
        sys.exit(1)


def end_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, number)


def require_gpus(count: int) -> None:
    """Raises DirlError where this machine has fewer than `count` GPUs, before any process is started."""
    import torch

    available = torch.cuda.device_count()
    if count > available:
        raise DirlError(f"gpus={count}: this machine has {counted(available, 'GPU')}: give no more, or device=cpu")


def run_under_launcher(name: str, out: str) -> None:
    """Run a command as one of the processes of another launcher, such as torchrun; rank 0 holds the run directory."""
    # How many processes there are is the launcher's to say, whatever the run was prepared with.
    cfg = saved_config(out)
    cfg.gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cfg.nodes = int(os.environ.get("WORLD_SIZE", 1)) // cfg.gpus
    try:
        if int(os.environ.get("RANK", 0)):
            import_module(f"dirl_cli.commands.{name}").run(cfg, Path(out))
        else:
            with locked(Path(out)):
                import_module(f"dirl_cli.commands.{name}").run(cfg, Path(out))
    except DirlError as error:
        print(f"dirl {name}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # skips the atexit handlers: they wait for the other processes


def run_beside(parent: str, name: str, out: str) -> None:
    """Run a command beside the run whose process id is `parent`, with the config in `out`, until that process ends."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it ended before the kernel was asked
    try:
        import_module(f"dirl_cli.commands.{name}").run(saved_config(out), Path(out))
    except DirlError as error:
        print(f"dirl {name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def saved_config(out: str) -> DictConfig:
    """The config of a run directory."""
    try:
        cfg = OmegaConf.load(Path(out, "config.yaml"))
    except FileNotFoundError:
        cfg = None
    if not isinstance(cfg, DictConfig):
        sys.exit(f"{out} holds no config.yaml of a run: write it with `dirl COMMAND … out={out} prepare=true` first")
    return cfg


def run_worker(name: str, out: str) -> None:
    """Run a command as one of the processes that `launch_workers` starts; the first to fail notes its sentence."""
    failure = Path(out, FAILURE)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # It may only have lost its connection to one that failed or was killed: then the launcher ends it meanwhile.
        time.sleep(NOTICE)
        if not failure.exists():
            print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = report
    try:
        import_module(f"dirl_cli.commands.{name}").run(saved_config(out), Path(out))
    except DirlError as error:
        if not failure.exists():
            failure.write_text(json.dumps([str(error), error.exit_code]))
        # Skip the atexit handlers: they wait for the other processes. Exit code 0 of one that was stopped lets those
        # save, where any other would make the launcher end them.
        os._exit(0 if isinstance(error, Stopped) else 1)


if __name__ == "__main__":
    replace_unencodable(sys.stdout, sys.stderr)
    if sys.argv[1] == "start":
        launch_workers(*sys.argv[2:])
    elif sys.argv[1] == "run":
        run_worker(*sys.argv[2:])
    elif sys.argv[1] == "beside":
        run_beside(*sys.argv[2:])
    else:
        run_under_launcher(*sys.argv[1:])
