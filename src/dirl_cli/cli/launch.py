"""From a command line to a running command: Hydra composes each job's config, its run directory is opened, it runs."""

import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
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
from dirl_cli.cli.former import todays_word
from dirl_cli.cli.group_help import show_asked_groups, show_choices
from dirl_cli.cli.gym_choices import name_gym_tasks
from dirl_cli.cli.processes import check_launch, start_workers
from dirl_cli.cli.run_dir import PATH_MODEL, Said, model_of_run, open_run
from dirl_cli.commands.loaded_model import sharing_models
from dirl_cli.console import replace_unencodable
from dirl_cli.errors import DirlError, Interrupted, Stopped, UnknownChoice, stop_code
from dirl_cli.files import conf_dir
from dirl_cli.ranges import format_value, require, types_of
from dirl_cli.text import is_secret, literal, redact

# Keys of several commands, by what they mean before a command starts.
FOR_A_MODEL = ("prompt", "messages", "instruction")  # whose text is a model's to read, secrets and all
WITHOUT_MODEL = ("compare", "predictions")  # that leave a command no use for a model
READ_ONLY = ("dry_run", "compare")  # that make a command look and tell: it opens no run directory


def launch(name: str, flags: Sequence[str], words: Sequence[str], config_dir: Path | None = None) -> None:
    """Compose conf/`name`.yaml with the overrides in `words` and run the command on it, once per sweep point.

    flags: Hydra's own, such as --multirun. config_dir: the user's config tree, which wins over ours.
    Raises DirlError for whatever the user can mend on the command line, and what the command itself raises.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine 6-fold
    replace_unencodable(sys.stdout, sys.stderr)
    for word in words:
        if re.search("[\ud800-\udfff]", word):  # Python's stand-ins for bytes that it cannot decode
            raise DirlError(
                f"{word.partition('=')[0]}=… holds letters that {sys.getfilesystemencoding()} has not:"
                " start it with LC_ALL=C.UTF-8"
            )

    config_tree.prepare(config_dir)
    if show_asked_groups(words, config_dir):
        return
    try:
        run_jobs(name, rewrite_words(name, flags, words))
    except UnknownChoice as error:
        show_choices(error.group, config_dir, stderr=True)
        raise
    except explain.COMPLAINTS as error:
        raise DirlError(explain.explain(error, name, words)) from error


@dataclass(frozen=True)
class HydraCommand:
    """What Hydra is given for a command line.

    fixed: the keys that do not tell a sweep's jobs apart. title: a sweep as the name of a file.
    """

    flags: Sequence[str]
    words: Sequence[str]
    fixed: Sequence[str]
    title: str

    @property
    def is_sweep(self) -> bool:
        return "--multirun" in self.flags


def rewrite_words(name: str, flags: Sequence[str], words: Sequence[str]) -> HydraCommand:
    """The command line in Hydra's own grammar.

    Raises DirlError for a word that no config may hold.
    """
    refuse_secrets(word.partition("=")[::2] for word in words)
    if any(word.startswith("-") for word in words):
        raise DirlError(explain.explain_options(name, words))

    # `bench=all` is a sweep over its members, whose title keeps the short word; so is a list of benchmarks.
    short_words = {word: word for word in words}
    if flags in ([], ["--multirun"]) and name != "download":
        expanded = overrides.expand_all(words, config_tree.members_of_all)
        if name == "eval":
            expanded = overrides.expand_list(expanded, "bench", config_tree.members_of_all)
            overrides.require_alone(expanded, "bench", "likelihood")
        short_words = dict(zip(expanded, words, strict=True))
        if expanded != list(words):
            flags = ["--multirun"]
            words = expanded
    if name == "eval":
        words = name_gym_tasks(words)
    words = [todays_word(word) for word in words]

    is_sweep = "--multirun" in flags
    learns_from_answers = name == "sft"
    words = overrides.rewrite(words, config_tree.choices, is_sweep, learns_from_answers)
    words = overrides.drop_preset(words, config_tree.preset(name))
    words = overrides.choose_files(words, lambda key: config_tree.has_key(name, words, key), learns_from_answers)

    fixed = overrides.fixed_keys(words) if is_sweep else []
    swept = [short_words.get(word, word) for word in words if word.partition("=")[0] not in fixed]
    return HydraCommand(flags, words, fixed, schema.slug(",".join(swept)))


def run_jobs(name: str, command: HydraCommand) -> None:
    """Let Hydra compose the config, or those of a sweep, and run the command on each."""
    ledger = Path("runs", name, f".sweep-{os.getpid()}").absolute()  # a file, since jobs may be other processes
    if command.is_sweep:
        begin_sweep(ledger)
        # Where it logs at DEBUG (hydra.verbose=true), Hydra lists a sweep's config as if it were one job's, and fails.
        logging.getLogger("hydra").setLevel(logging.INFO)

    # An error of a single job leaves Hydra's loop by this list, since Hydra would wrap it.
    errors: list[DirlError] = []

    def task(cfg: DictConfig) -> None:
        try:
            run_job(name, cfg, command.fixed, ledger)
        except DirlError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                print(f"dirl {name}: {error}", file=sys.stderr)
                if isinstance(error, Stopped):
                    raise SystemExit(error.exit_code) from None  # and not the next job
                raise  # the launcher, perhaps in another process, marks the job as failed and goes on
            errors.append(error)

    sys.argv = [f"dirl {name}", *command.flags, *command.words, f"hydra.job.name={name}"]
    sys.excepthook = report_bug
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of reporting by itself
    try:
        with sharing_models() if command.is_sweep else nullcontext():
            hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(task)()
    except explain.COMPLAINTS as error:
        raise DirlError(explain.explain(error, name, command.words)) from error
    except DirlError as error:
        sum_up(name, command.title, ledger)
        raise DirlError("the sweep is over, and not every run of it succeeded") from error

    if errors:
        raise errors[0]
    if command.is_sweep:
        sum_up(name, command.title, ledger)


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
    unresolved = OmegaConf.to_container(cfg)
    settle_config(name, cfg)

    is_sweep_job = HydraConfig.get().mode == RunMode.MULTIRUN
    out = Path(cfg.out) if "out" in cfg else None
    job: list[str] = []
    if is_sweep_job:
        job = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] not in fixed]
        if out:
            out = out / schema.slug(",".join(word for word in job if not name_tells(unresolved, word)))
        destination = ["→", out] if out else []
        print(f"dirl {name} {' '.join(job)}", *destination, flush=True)
    if line := preset_line(name, cfg):
        print(line, flush=True)
    if out and announces_directory(cfg):
        print(f"dirl {name} → {out}", flush=True)  # before what takes seconds to import
    if out:
        cfg.out = literal(str(out))

    if "launch" in cfg:
        check_launch(name, cfg)
    writes_run = "resume" in cfg and not any(cfg.get(key) for key in READ_ONLY)
    try:
        if out and writes_run:
            run_in_directory(name, cfg, out)
        else:
            run_here(name, cfg, out)
    except KeyboardInterrupt as interrupt:
        state = "nothing was finished"
        if out and writes_run and out.exists():
            state = f"what is finished is in {out}, and the same command goes on"
        raise Stopped(f"stopped: {state}", stop_code(interrupt)) from None

    if out and writes_run and is_sweep_job:
        with ledger.open("a") as lines:
            lines.write(json.dumps([HydraConfig.get().job.num, job, str(out)]) + "\n")


def settle_config(name: str, cfg: DictConfig) -> None:
    """Resolve and check a composed config, in place; a model that is a run's is looked up.

    Raises DirlError for the first setting that is missing, secret or cannot have its value.
    """
    missing = [key for key, value in config_tree.leaves(OmegaConf.to_container(cfg)) if value == "???"]
    if missing:
        raise DirlError(f"give a value for {' and '.join(missing)}, such as {missing[0]}=…")
    try:
        config_tree.resolve(cfg)
    except OmegaConfBaseException as error:
        raise DirlError(explain.explain(error, name, [])) from error

    refuse_secrets(config_tree.leaves(OmegaConf.to_container(cfg)))
    check_values(name, cfg)
    if OmegaConf.select(cfg, "model._target_") == PATH_MODEL:
        model: Any = OmegaConf.to_container(cfg.model)
        cfg.model = model_of_run(model)


def run_in_directory(name: str, cfg: DictConfig, out: Path) -> None:
    """Run a command that writes the run directory `out`: here, or in several processes, or only prepare it."""
    # The first machine alone opens the directory, which the others see on a shared disk.
    is_first = "nodes" in cfg and (cfg.nodes == 1 or cfg.node_rank == 0)
    with open_run(out, cfg, said_keys(), cfg.resume) if is_first else nullcontext() as lock:
        if cfg.prepare:
            command = f"torchrun --nproc_per_node N -m dirl_cli.cli.worker {name} {out}"
            print(f"{out} is prepared: start it with {command}")
        elif cfg.gpus * cfg.nodes > 1:
            start_workers(name, cfg, out, [lock.fileno()] if lock else [])
        else:
            run_here(name, cfg, out)


def said_keys() -> Said:
    """What the words of the command line set."""
    hydra_cfg = HydraConfig.get()
    groups = set(hydra_cfg.runtime.choices)
    keys = {word.partition("=")[0].lstrip("+~") for word in hydra_cfg.overrides.task}
    return Said(values=keys - groups, choices=keys & groups)


def run_here(name: str, cfg: DictConfig, out: Path | None) -> None:
    """Run a command in this process, which SIGTERM ends as Ctrl-C does."""
    with heeding_sigterm():
        import_module(f"dirl_cli.commands.{name}").run(cfg, out)


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that the command says how far it came."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if current_thread() is not main_thread():
        yield  # a sweep's launcher may run jobs in threads, where Python allows no handlers
        return
    handler = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def announces_directory(cfg: DictConfig) -> bool:
    """Whether to say where a command writes: not for a sweep's job, announced already, and in one process only."""
    is_job = HydraConfig.get().mode == RunMode.MULTIRUN
    return not is_job and not any(cfg.get(key) for key in READ_ONLY) and os.environ.get("RANK", "0") == "0"


def preset_line(name: str, cfg: DictConfig) -> str | None:
    """The line of a command that runs its preset because no model was given; None otherwise, or said already."""
    hydra_cfg = HydraConfig.get()
    preset = hydra_cfg.runtime.choices.get("experiment")
    is_explicit = any(word.startswith("experiment=") for word in hydra_cfg.overrides.task)
    is_later_job = hydra_cfg.mode == RunMode.MULTIRUN and hydra_cfg.job.num > 0
    needs_no_model = any(cfg.get(key) for key in WITHOUT_MODEL)
    if preset is None or is_explicit or is_later_job or needs_no_model:
        return None
    facts = [f"model={hydra_cfg.runtime.choices['model']} ({cfg.model.get('path', 'random weights')})"]
    facts += [f"{group}={cfg[group].name}" for group in ("data", "bench") if cfg.get(group) and not cfg.get("harness")]
    return f"no model= is given, so this is experiment={preset}: {', '.join(facts)}"


def check_values(name: str, cfg: DictConfig) -> None:
    """Raises DirlError for the first setting that nothing reads or that cannot have its value.

    To find out, every group is built, but for those that this command makes nothing of as it is given.
    """
    kind = schema.SCHEMAS[name]
    settings = {str(key): value for key, value in cast(dict, OmegaConf.to_container(cfg)).items()}
    types = types_of(kind)
    unread = [key for key in settings if key not in types]
    if unread:
        valid = [key for key, _ in config_tree.leaves(settings) if key.partition(".")[0] in types]
        raise DirlError(f"{unread[0]}: no such key; {explain.hint(name, unread[0], valid)}")
    require(settings, kind)
    if name == "download":
        return

    # Without a model the others are not even imported: they would bring torch, which takes seconds.
    groups = ["bench"] if any(cfg.get(key) for key in WITHOUT_MODEL) else list(types)
    for group in groups:
        if is_dataclass(types[group]):
            build(cfg[group], types[group])
        elif types[group] is Any and isinstance(cfg[group], DictConfig):
            build(cfg[group])
        elif cfg[group] is not None and (conf_dir() / group).is_dir():  # as a config of the user's own may say
            raise DirlError(f"{group}={format_value(cfg[group])}: give a mapping as those in {conf_dir() / group}")
    if "name" in settings and leaves_runs(cfg.name):
        raise DirlError(f"name={cfg.name} is no name of a directory in runs: for one elsewhere give out=DIR")


def leaves_runs(name: str) -> bool:
    """Whether a run's name leads out of the directory that its command's runs are in."""
    return Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts


def refuse_secrets(settings: Iterable[tuple[str, Any]]) -> None:
    """Raises DirlError for a setting that holds a secret, since configurations are saved; prompts may hold any text."""
    for key, value in settings:
        if key.partition(".")[0] not in FOR_A_MODEL and is_secret(key, value):
            raise DirlError(f"{key} holds a secret, and configurations are saved: set an environment variable instead")


def name_tells(unresolved: Any, word: str) -> bool:
    """Whether the run's name already tells the choice of an override, as tiny-arithmetic does for bench=arithmetic.

    unresolved: the config before references such as `${data.name}` were replaced.
    """
    group, _, choice = word.partition("=")
    has_name = "${name}" in unresolved.get("out", "")
    names_group = f"${{{group}.name}}" in unresolved.get("name", "")
    return has_name and names_group and unresolved[group]["name"] == choice


def sum_up(name: str, title: str, ledger: Path) -> None:
    """End a sweep with the command's own `after_sweep`, if it has one. title: the sweep as the name of a file."""
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    jobs = sorted(json.loads(line) for line in lines)  # by their numbers: they may have ended in another order
    ledger.unlink(missing_ok=True)
    if not jobs:
        return
    command = import_module(f"dirl_cli.commands.{name}")
    if hasattr(command, "after_sweep"):
        command.after_sweep(title, [(job, Path(out)) for _, job, out in jobs])


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback without the frames of Typer and Hydra that lead to the command."""
    frame = trace
    last_of_ours = trace
    while frame:
        if frame.tb_frame.f_code.co_filename == __file__:
            last_of_ours = frame
        frame = frame.tb_next
    print(redact("".join(traceback.format_exception(kind, error, last_of_ours))), end="", file=sys.stderr)
