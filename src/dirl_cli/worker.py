"""A command in several processes: `start` runs Accelerate's launcher, which runs `run` once per process.

No process composes a config of its own: each reads the one that the parent saved in the run directory.
"""

import ctypes
import logging
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType

from omegaconf import DictConfig, OmegaConf

from dirl_cli.errors import DirlError

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in Linux's prctl.h
FAILURE = "failure.txt"  # in the run directory: the sentence of the process that failed first


def start(processes: str, name: str, out: str) -> None:
    """Run a command in as many processes on this machine; exit 1 when one of them fails."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)  # end with the parent, even if it is killed
    options = f"--multi_gpu --num_processes {processes} --num_machines 1 --main_process_port 0"
    options += " --mixed_precision no --dynamo_backend no"
    script = ["-m", "dirl_cli.worker", "run", name, out]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failed process tells its own reason
    try:
        launch_command(launch_command_parser().parse_args([*options.split(), *script]))
    except (ChildFailedError, SignalException):
        sys.exit(1)


def run(name: str, out: str) -> None:
    """One of the processes."""
    failure = Path(out, FAILURE)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not failure.exists():  # otherwise this process only lost its connection to the one that failed
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    cfg = OmegaConf.load(Path(out, "config.yaml"))
    assert isinstance(cfg, DictConfig)
    try:
        import_module(f"dirl_cli.commands.{name}").run(cfg, Path(out))
    except DirlError as error:
        if not failure.exists():
            failure.write_text(str(error))
        os._exit(1)  # without the farewells that would wait for the other processes


if __name__ == "__main__":
    if sys.argv[1] == "start":
        start(*sys.argv[2:])
    else:
        run(*sys.argv[2:])
