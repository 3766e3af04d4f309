"""From a command line to running commands: Hydra composes each job's config, its run directory is opened, it starts."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirl_cli.cli import config_tree, explain, overrides, schema
from dirl_cli.cli.build import build
from dirl_cli.cli.run_dir import PATH_MODEL, model_of_run, open_run
from dirl_cli.cli.worker import FAILURE, require_gpus
from dirl_cli.console import replace_unencodable
from dirl_cli.errors import DirlError, DoesNotFit, Interrupted, Stopped, stop_code
from dirl_cli.files import conf_dir
from dirl_cli.ranges import format_value, require, types_of
from dirl_cli.text import counted, is_secret, literal, redact
from dirl_cli.types import SHARDED_LAUNCHES

SAVING = "3600"  # seconds that processes are given to end the step and save, once they are asked to stop
ASKED = ("prompt", "messages", "instruction")  # keys whose text is a model's to read
WITHOUT_MODEL = ("compare", "predictions")  # keys that leave a command no use for a model
READ_ONLY = ("dry_run", "compare")  # keys that make a command look and tell: it opens no run directory


def launch(name: str, flags: Sequence[str], words: Sequence[str], config_dir: Path | None = None) -> None:
    """Compose conf/`name`.yaml with the overrides in `words` and run the command on it, once per sweep point.

    flags: Hydra's own, such as --multirun. config_dir: the user's config tree, which wins over ours.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine 6-fold
    replace_unencodable(sys.stdout, sys.stderr)
    if unread := [
        word for word in words if re.search("[\ud800-\udfff]", word)
    ]:  # Python's place for a byte it cannot read
        raise DirlError(
            f"{unread[0].partition('=')[0]}=… holds letters that {sys.getfilesystemencoding()} has not:"
            " start it with LC_ALL=C.UTF-8"
        )
    config_tree.prepare(config_dir)
    try:
        compose(name, flags, words)
    except explain.COMPLAINTS as error:
        raise DirlError(explain.explain(error, name, words)) from error


def compose(name: str, flags: Sequence[str], words: Sequence[str]) -> None:
    """Let Hydra compose the config and run the command on it."""
    refuse_secrets(word.partition("=")[::2] for word in words)
    if any(word.startswith("-") for word in words):
        raise DirlError(explain.explain_options(name, words))
    may_sweep = flags in ([], ["--multirun"]) and name != "download"
    spelled = overrides.expand_all(words, config_tree.members_of_all) if may_sweep else list(words)
    short = dict(zip(spelled, words, strict=True))
    if spelled != list(words):
        flags, words = ["--multirun"], spelled
    sweep = "--multirun" in flags
    words = overrides.rewrite(words, config_tree.choices, sweep)
    words = overrides.drop_preset(words, config_tree.preset(name))
    words = overrides.choose_files(words, lambda key: config_tree.has_key(name, words, key))
    fixed = [] if not sweep else overrides.fixed_keys(words)
    title = schema.slug(",".join(short.get(word, word) for word in words if word.partition("=")[0] not in fixed))
    ledger = Path("runs", name, f".sweep-{os.getpid()}").absolute()  # a file, since jobs may be other processes
    if sweep:
        begin_sweep(ledger)
        # Where it logs at DEBUG (hydra.verbose=true), Hydra lists a sweep's config as if it were one job's, and fails.
        logging.getLogger("hydra").setLevel(logging.INFO)
    failed: list[DirlError] = []

    def task(cfg: DictConfig) -> None:
        try:
            run_job(name, cfg, fixed, ledger)
        except DirlError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"dirl {name}: {error}", file=sys.stderr)
                if isinstance(error, Stopped):
                    raise SystemExit(error.exit_code) from None  # and not the next job
                raise  # the launcher, perhaps in another process, marks the job as failed and goes on
            failed.append(error)

    sys.argv = [f"dirl {name}", *flags, *words, f"hydra.job.name={name}"]
    sys.excepthook = report_bug
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of reporting by itself
    try:
        hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(task)()
    except explain.COMPLAINTS as error:
        raise DirlError(explain.explain(error, name, words)) from error
    except DirlError as error:
        sum_up(name, title, ledger)
        raise DirlError("the sweep is over, and not every run of it succeeded") from error
    if failed:
        raise failed[0]
    if sweep:
        sum_up(name, title, ledger)


def begin_sweep(ledger: Path) -> None:
    """Make the file in which jobs note that they are done, where Hydra keeps the sweep's config too."""
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        ledger.write_text("")  # there may be one of a sweep that was killed
    except OSError as error:
        raise DirlError(
            f"{ledger.parent} cannot be written ({error.strerror}), where a sweep leaves its config:"
            " start it in another directory"
        ) from error


def run_job(name: str, cfg: DictConfig, fixed: Sequence[str], ledger: Path) -> None:
    """Run a command on a composed config.

    fixed: the keys that do not tell a sweep's jobs apart. ledger: where a job of a sweep notes that it is done.
    """
    if missing := [key for key, value in config_tree.leaves(OmegaConf.to_container(cfg)) if value == "???"]:
        raise DirlError(f"give a value for {' and '.join(missing)}, such as {missing[0]}=…")
    unresolved = OmegaConf.to_container(cfg)
    try:
        config_tree.resolve(cfg)
    except OmegaConfBaseException as error:
        raise DirlError(explain.explain(error, name, [])) from error
    refuse_secrets(config_tree.leaves(OmegaConf.to_container(cfg)))
    check_values(name, cfg)
    if OmegaConf.select(cfg, "model._target_") == PATH_MODEL:
        given: Any = OmegaConf.to_container(cfg.model)
        cfg.model = model_of_run(given)
    out = Path(cfg.out) if "out" in cfg else None
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        job = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] not in fixed]
        out = out and out / schema.slug(",".join(word for word in job if not name_tells(unresolved, word)))
        print(f"dirl {name} {' '.join(job)}", *(["→", out] if out else []), flush=True)
    if line := preset_line(name, cfg):
        print(line, flush=True)
    if out and announces_directory(cfg):
        print(f"dirl {name} → {out}", flush=True)  # before what takes seconds to import
    if out:
        cfg.out = literal(str(out))
    if "launch" in cfg:
        check_launch(name, cfg)
    writes = out and "resume" in cfg and not any(cfg.get(key) for key in READ_ONLY)
    is_first = "nodes" in cfg and (cfg.nodes == 1 or cfg.node_rank == 0)
    try:
        with open_run(out, cfg, cfg.resume) if out and writes and is_first else nullcontext() as lock:
            if out and writes and cfg.prepare:
                print(
                    f"{out} is prepared: start it with torchrun --nproc_per_node N -m dirl_cli.cli.worker {name} {out}"
                )
            elif out and writes and cfg.gpus * cfg.nodes > 1:
                start_workers(name, cfg, out, [lock.fileno()] if lock else [])
            else:
                with heeding_sigterm():
                    import_module(f"dirl_cli.commands.{name}").run(cfg, out)
    except KeyboardInterrupt as asked:
        left = "nothing was finished"
        if out and writes and out.exists():
            left = f"what is finished is in {out}, and the same command goes on"
        raise Stopped(f"stopped: {left}", stop_code(asked)) from None
    if out and writes and HydraConfig.get().mode == RunMode.MULTIRUN:
        with ledger.open("a") as lines:
            lines.write(json.dumps([HydraConfig.get().job.num, job, str(out)]) + "\n")


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that it says what is left of it."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if current_thread() is not main_thread():
        yield  # a sweep's launcher may run jobs in threads, where Python allows no handlers
        return
    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def announces_directory(cfg: DictConfig) -> bool:
    """Whether this command writes, is no job of a sweep, which is announced, and is the first of its processes."""
    is_job = HydraConfig.get().mode == RunMode.MULTIRUN
    return not is_job and not any(cfg.get(key) for key in READ_ONLY) and os.environ.get("RANK", "0") == "0"


def preset_line(name: str, cfg: DictConfig) -> str | None:
    """What a command says that was not told which model to take; once in a sweep."""
    hydra_cfg = HydraConfig.get()
    preset = hydra_cfg.runtime.choices.get("experiment")
    is_asked_for = any(word.startswith("experiment=") for word in hydra_cfg.overrides.task)
    is_repeated = hydra_cfg.mode == RunMode.MULTIRUN and hydra_cfg.job.num > 0
    if preset is None or is_asked_for or is_repeated or any(cfg.get(key) for key in WITHOUT_MODEL):
        return None
    facts = [f"model={hydra_cfg.runtime.choices['model']} ({cfg.model.get('path', 'random weights')})"]
    facts += [f"{group}={cfg[group].name}" for group in ("data", "bench") if group in cfg]
    return f"no model= is given, so this is experiment={preset}: {', '.join(facts)}"


def check_values(name: str, cfg: DictConfig) -> None:
    """Raises DirlError for the first setting that nothing reads or that cannot have its value.

    Every group is built for that, but for those that this command, as it is given, makes nothing of.
    """
    kind = schema.SCHEMAS[name]
    settings = {str(key): value for key, value in cast(dict, OmegaConf.to_container(cfg)).items()}
    types = types_of(kind)
    if unread := [key for key in settings if key not in types]:
        known = [key for key, _ in config_tree.leaves(settings) if key.partition(".")[0] in types]
        raise DirlError(f"{unread[0]}: no such key; {explain.hint(name, unread[0], known)}")
    require(settings, kind)
    if name == "download":
        return
    loads_nothing = cfg.get("predictions") or cfg.get("compare")  # and imports no torch to find that out
    for group in ["bench"] if loads_nothing else types:
        if is_dataclass(types[group]):
            build(cfg[group], types[group])
        elif types[group] is Any and isinstance(cfg[group], DictConfig):
            build(cfg[group])
        elif (conf_dir() / group).is_dir():  # as a config of the user's own may say
            raise DirlError(f"{group}={format_value(cfg[group])}: give a mapping as those in {conf_dir() / group}")
    if "name" in settings and leaves_runs(cfg.name):
        raise DirlError(f"name={cfg.name} is no name of a directory in runs: for one elsewhere give out=DIR")


def leaves_runs(name: str) -> bool:
    """Whether a run's name leads out of the directory that its command's runs are in."""
    return Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts


def refuse_secrets(settings: Iterable[tuple[str, Any]]) -> None:
    """Raises DirlError for a setting that nobody may read, since configurations are saved; what is asked may be any."""
    if found := [key for key, value in settings if key.partition(".")[0] not in ASKED and is_secret(key, value)]:
        raise DirlError(f"{found[0]} holds a secret, and configurations are saved: set an environment variable instead")


def name_tells(unresolved: Any, word: str) -> bool:
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


def check_launch(name: str, cfg: DictConfig) -> None:
    """Raises DirlError where `launch` does not go with the rest; cpu_gloo settles the device."""
    processes = cfg.gpus * cfg.nodes
    if cfg.launch == "single" and processes > 1:
        raise DirlError("launch=single is one process: leave gpus and nodes at 1, or launch at auto")
    if cfg.launch in SHARDED_LAUNCHES and name == "eval":
        raise DirlError(f"launch={cfg.launch} shares a model that is trained: leave launch at auto for dirl eval")
    if cfg.launch in SHARDED_LAUNCHES and processes == 1:
        raise DirlError(f"launch={cfg.launch} shares a model among processes: give gpus=2 or more, or launch=single")
    is_placed = cfg.node_rank is not None and cfg.node_rank < cfg.nodes and cfg.main_address is not None
    if cfg.nodes > 1 and not is_placed:
        ranks = f"node_rank, 0 to {cfg.nodes - 1}"
        raise DirlError(f"nodes={cfg.nodes}: give each machine its {ranks}, and the main_address of machine 0")
    if cfg.launch == "cpu_gloo":
        cfg.device = "cpu"


def start_workers(name: str, cfg: DictConfig, out: Path, locks: Sequence[int]) -> None:
    """Run a command in one process per GPU (or CPU share); each reads the config saved in `out`.

    locks: file descriptors that keep `out` theirs even if this process is killed.
    """
    import psutil
    from accelerate.utils import is_cuda_available

    on_cpu = cfg.device == "cpu" or not is_cuda_available()
    if not on_cpu:
        require_gpus(cfg.gpus)
    environment = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING, **os.environ}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    asked: list[int] = []  # the signals to stop
    failure = out / FAILURE
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dirl_cli.cli.worker", "start", name, str(out), *accelerate_options(cfg)]
    print(starting(cfg, os.cpu_count() if on_cpu else None), flush=True)

    def terminate(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        launcher.terminate()

    # In a session of its own it does not see Ctrl-C, which would reach every process twice.
    with subprocess.Popen(command, env=environment, pass_fds=locks, start_new_session=True) as launcher:
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            launcher.wait()
        except KeyboardInterrupt:
            asked.append(signal.SIGINT)
            launcher.terminate()  # which they take as a wish to stop
            try:
                launcher.wait()
            except KeyboardInterrupt:  # the second, which waits for nothing
                for process in psutil.Process(launcher.pid).children(recursive=True):
                    process.kill()
        finally:
            signal.signal(signal.SIGTERM, before)
    if failure.exists():
        reason, code = json.loads(failure.read_text())
        failure.unlink()
        for kind in (DirlError, DoesNotFit):
            if code == kind.exit_code:
                raise kind(reason)
        raise Stopped(reason, stop_code(Interrupted(asked[0])) if asked else code)
    if asked:
        raise Interrupted(asked[0])
    if launcher.returncode:
        raise DirlError("a process failed, for the reason above")


def starting(cfg: DictConfig, cores: int | None) -> str:
    """What is waited for until the processes say something themselves. cores: those that they share, if they do."""
    count = f"{cfg.gpus} processes" if cfg.gpus > 1 else "a process"
    if cores and cfg.gpus > cores:
        count += f", which take turns on {counted(cores, 'CPU core')}"
    if cfg.nodes == 1:
        return f"starting {count}"
    host, _, port = cfg.main_address.partition(":")
    others = [f"machine {rank}" for rank in range(cfg.nodes) if rank != cfg.node_rank]
    named = " and ".join([", ".join(others[:-1]), others[-1]] if len(others) > 1 else others)
    return f"starting {count} as machine {cfg.node_rank}; waits for {named} at {host}:{port or 29500}"


def accelerate_options(cfg: DictConfig) -> list[str]:
    """How many processes there are and how they find each other, in the words of `accelerate launch`."""
    options = f"--multi_gpu --mixed_precision no --dynamo_backend no --num_processes {cfg.gpus * cfg.nodes}"
    if cfg.nodes == 1:
        return f"{options} --num_machines 1 --main_process_port 0".split()
    host, _, port = cfg.main_address.partition(":")
    where = (
        f"--same_network --machine_rank {cfg.node_rank} --main_process_ip {host} --main_process_port {port or 29500}"
    )
    return f"{options} --num_machines {cfg.nodes} {where}".split()


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without the frames of Typer and Hydra that lead to the command."""
    frame = start = trace
    while frame:
        if frame.tb_frame.f_code.co_filename == __file__:
            start = frame
        frame = frame.tb_next
    print(redact("".join(traceback.format_exception(kind, error, start))), end="", file=sys.stderr)
