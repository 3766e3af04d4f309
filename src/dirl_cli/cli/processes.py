"""A command in several processes, from the parent's side: whether `launch` allows it, starting them, ending them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig

from dirl_cli.cli.worker import FAILURE, require_gpus
from dirl_cli.distributed import require_whole_groups
from dirl_cli.errors import DirlError, DoesNotFit, Interrupted, Stopped, stop_code
from dirl_cli.text import counted
from dirl_cli.types import SHARDED_LAUNCHES

SAVING = "3600"  # seconds that processes are given to end the step and save, once they are asked to stop
PORT = 29500  # of machine 0, where main_address names none


def check_launch(name: str, cfg: DictConfig) -> None:
    """Settle the device of `launch=cpu_gloo`.

    Raises DirlError where `launch` does not go with the command, `gpus` or `nodes`, or `context_parallel` with these.
    """
    # Said here, in one process: each of several would say it again, and wait for the others first.
    processes = cfg.gpus * cfg.nodes
    if cfg.launch == "single" and processes > 1:
        raise DirlError("launch=single is one process: leave gpus and nodes at 1, or launch at auto")
    if cfg.launch in SHARDED_LAUNCHES and name == "eval":
        raise DirlError(f"launch={cfg.launch} shares a model that is trained: leave launch at auto for dirl eval")
    if cfg.launch in SHARDED_LAUNCHES and processes == 1:
        raise DirlError(f"launch={cfg.launch} shares a model among processes: give gpus=2 or more, or launch=single")
    require_whole_groups(getattr(cfg, "context_parallel", 1), processes)

    has_address = cfg.node_rank is not None and cfg.node_rank < cfg.nodes and cfg.main_address is not None
    if cfg.nodes > 1 and not has_address:
        ranks = f"node_rank, 0 to {cfg.nodes - 1}"
        raise DirlError(f"nodes={cfg.nodes}: give each machine its {ranks}, and the main_address of machine 0")
    if cfg.launch == "cpu_gloo":
        cfg.device = "cpu"


def start_workers(name: str, cfg: DictConfig, out: Path, locks: Sequence[int]) -> None:
    """Run a command in one process per GPU (or CPU share), and wait for them; each reads the config saved in `out`.

    locks: file descriptors that keep `out` theirs even if this process is killed.
    Raises what the first process that failed said: DirlError, DoesNotFit or Stopped. Raises Interrupted where a signal
    ended them before they had begun.
    """
    from accelerate.utils import is_cuda_available

    on_cpu = cfg.device == "cpu" or not is_cuda_available()
    if not on_cpu:
        require_gpus(cfg.gpus)

    # One thread a process, since the processes share the cores; who knows better sets the variable.
    environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING, **os.environ}
    if on_cpu:
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    failure = out / FAILURE
    failure.unlink(missing_ok=True)  # of an earlier start
    command = [sys.executable, "-m", "dirl_cli.cli.worker", "start", name, str(out), *accelerate_options(cfg)]
    print(starting(cfg, os.cpu_count() if on_cpu else None), flush=True)

    exit_code, stop_signals = wait_for_launcher(command, environment, locks)

    # A process that failed left its sentence, which says more than an exit code or a signal.
    if failure.exists():
        reason, code = json.loads(failure.read_text())
        failure.unlink()
        for kind in (DirlError, DoesNotFit):
            if code == kind.exit_code:
                raise kind(reason)
        raise Stopped(reason, stop_code(Interrupted(stop_signals[0])) if stop_signals else code)
    if stop_signals:
        raise Interrupted(stop_signals[0])
    if exit_code:
        raise DirlError("a process failed, for the reason above")


def wait_for_launcher(
    command: Sequence[str], environment: dict[str, str], locks: Sequence[int]
) -> tuple[int, list[int]]:
    """Run Accelerate's launcher to its end, passing signals on. Returns its exit code and the signals that came.

    The first Ctrl-C asks the processes to save and stop; the second kills them.
    """
    import psutil

    stop_signals: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        stop_signals.append(number)
        launcher.terminate()

    # In a session of its own it does not see Ctrl-C, which would reach every process twice.
    with subprocess.Popen(command, env=environment, pass_fds=locks, start_new_session=True) as launcher:
        handler = signal.signal(signal.SIGTERM, terminate)
        try:
            launcher.wait()
        except KeyboardInterrupt:
            stop_signals.append(signal.SIGINT)
            launcher.terminate()  # which the processes take as a wish to stop
            try:
                launcher.wait()
            except KeyboardInterrupt:  # the second, which waits for nothing
                for process in psutil.Process(launcher.pid).children(recursive=True):
                    process.kill()
        finally:
            signal.signal(signal.SIGTERM, handler)
    return launcher.returncode, stop_signals


def starting(cfg: DictConfig, cores: int | None) -> str:
    """The line that says what is started, and what it waits for until the processes print something themselves.

    cores: of the CPU, where the processes share it; None where each has a GPU.
    """
    count = f"{cfg.gpus} processes" if cfg.gpus > 1 else "a process"
    if cores and cfg.gpus > cores:
        count += f", which take turns on {counted(cores, 'CPU core')}"
    if cfg.nodes == 1:
        return f"starting {count}"

    *machines, last = [f"machine {rank}" for rank in range(cfg.nodes) if rank != cfg.node_rank]
    awaited = f"{', '.join(machines)} and {last}" if machines else last
    host, port = host_and_port(cfg)
    return f"starting {count} as machine {cfg.node_rank}; waits for {awaited} at {host}:{port}"


def accelerate_options(cfg: DictConfig) -> list[str]:
    """How many processes there are and how they find each other, in the words of `accelerate launch`."""
    options = f"--multi_gpu --mixed_precision no --dynamo_backend no --num_processes {cfg.gpus * cfg.nodes}"
    if cfg.nodes == 1:
        return f"{options} --num_machines 1 --main_process_port 0".split()
    host, port = host_and_port(cfg)
    machines = f"--num_machines {cfg.nodes} --same_network --machine_rank {cfg.node_rank}"
    return f"{options} {machines} --main_process_ip {host} --main_process_port {port}".split()


def host_and_port(cfg: DictConfig) -> tuple[str, str]:
    """Where machine 0 listens."""
    host, _, port = cfg.main_address.partition(":")
    return host, port or str(PORT)
