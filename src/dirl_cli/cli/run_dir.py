"""A run directory: one configuration, one process at a time, and the same command continues what is there."""

import fcntl
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.config_tree import leaves
from dirl_cli.cli.former import todays_target
from dirl_cli.errors import DirlError
from dirl_cli.files import installed, unused_name, write_json, write_text
from dirl_cli.text import redact
from dirl_cli.types import STATE

# Keys that may change between two starts of a run, because its result does not depend on them.
START = {"name", "out", "resume", "prepare", "dry_run", "plan", "price_per_gpu_hour", "max_skipped"}
MACHINES = {"gpus", "nodes", "node_rank", "main_address", "launch", "memory_gb"}
WORK = {  # how it is done
    "gradient_checkpointing",
    "context_parallel",
    "compile",
    "rollout.max_batch",
    "rollout.cache_share",
    "rollout.record_entropy",
    "rollout.url",
    "rollout.servers",
    "rollout.directory",
    "rollout.silence",
    "rollout.push",
    "rollout.push_host",
    "rollout.push_timeout",
    "rollout.patience",
    "reward.workers",
    "grade_workers",
}
SHOWING = {"logger", "log_every", "show_every", "eval_every", "eval_problems", "mask_rates"}
SAVING = {
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "async_checkpoints",
    "rl.compress_rollouts",
    "push_to_hub",
    "model.made_by",
}
ANSWERS = {"samples", "limit", "ids"}  # which answers an evaluation has, not what they are
FREE = frozenset(START | MACHINES | WORK | SHOWING | SAVING | ANSWERS)

MAPPINGS = ("options", "weights")  # whose keys are a run's own: one that is absent stands for nothing

BEGINNINGS = {"config.yaml", "environment.json", "lock", "failure.txt"}  # files of a run that failed at once
BEGUN = BEGINNINGS | {"servers"}  # nor is one more than begun whose servers failed, and left logs that tell why
PATH_MODEL = "dirl_cli.models.load.SavedModel"  # the model whose path may be a run's, or one of its checkpoints
PACKAGES = ("dirl", "torch", "transformers", "accelerate")
MOMENT = 1.0  # seconds that a start tries to lock: `dirl runs` and `dirl doctor` hold a lock while they look at it


@dataclass(frozen=True)
class Said:
    """The keys that a command line sets: those that it gives a value, and the groups of which it makes a choice."""

    values: Collection[str]
    choices: Collection[str]


@contextmanager
def open_run(out: Path, cfg: DictConfig, said: Said, resume: str) -> Iterator[IO[str]]:
    """Hold the run directory `out` as long as the lock file that is yielded stays open.

    Writes `config.yaml` and `environment.json` into it. A run that fails before it has written more leaves nothing.

    said: what of the config is the user's word, and no default. A run of an earlier version goes on under the defaults
    of keys that are new.
    resume: `never` moves an existing run to `out`~1, `out`~2, …; anything else continues it.
    Raises DirlError if another process holds it, if it cannot be written, or if the run there has another config.
    """
    if resume not in ("auto", "never") and not Path(resume).expanduser().exists():
        raise DirlError(f"resume={resume}: there is no such checkpoint; give auto, never or the path of one")
    config = OmegaConf.to_yaml(cfg)  # where texts with `${…}` in them are read back as they are

    # Locked while it is moved, so that no run goes on writing under the new name.
    if resume == "never" and (out / "config.yaml").exists():
        with locked(out):
            earlier = unused_name(out)
            out.rename(earlier)
        print(f"the earlier run is in {earlier}", flush=True)

    # A new start may change what is free to change: what is there then describes the last one.
    with locked(out) as lock:
        refuse_other(out, config, said)
        write_text(out / "config.yaml", config)
        write_json(out / "environment.json", environment())
        with ExitStack() as on_failure:
            on_failure.callback(remove_if_empty, out)
            yield lock
            on_failure.pop_all()


def model_of_run(model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model, of which `path` may be the directory of a run or one of its checkpoints.

    A run's directory stands for the model that it ended with. A checkpoint is put together as its run did it.
    Raises DirlError where the run has not ended, or where a checkpoint is not in its run.
    """
    path = Path(model["path"]).expanduser()
    # config.yaml makes it a run of ours, config.json a model in the published layout.
    if (path / "config.yaml").is_file() and not (path / "config.json").exists():
        return model | {"path": str(finished_model(path))}
    if not (path / STATE).is_file():
        return model

    # A checkpoint holds what was trained and no more: the rest is put together from its run's own settings.
    run = path.resolve().parents[1]
    if not (run / "config.yaml").is_file():
        raise DirlError(f"{path} is a checkpoint without its run: put it back into RUN/checkpoints, beside config.yaml")
    if model.get("mask_token_id") is not None:
        raise DirlError(f"{path} has the mask token of its run: leave model.mask_token_id out")
    settings: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    base = settings["model"]
    base |= grown_blocks(path)
    if model.get("block_size") is not None:
        base |= {"block_size": model["block_size"]}
    return {
        "_target_": "dirl_cli.training.trained_model.TrainedModel",
        "name": model["name"],
        "path": str(path),
        "adapter": model.get("adapter"),
        "base": base,
        "peft": settings["peft"],
    }


def grown_blocks(checkpoint: Path) -> dict[str, Any]:
    """The `block_size` of a checkpoint, where its run's blocks grow; nothing else. Raises DirlError for damage."""
    try:
        remembered = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DirlError(f"{checkpoint / STATE} cannot be read: give another checkpoint of the run") from error
    if not isinstance(remembered, dict) or "block_size" not in remembered:
        return {}
    return {"block_size": remembered["block_size"]}


def finished_model(run: Path) -> Path:
    """The directory of the model that a run ended with. Raises DirlError where it has not ended."""
    if (run / "model").is_dir():
        return run / "model"
    checkpoints = sorted(path.parent for path in run.glob(f"checkpoints/step-*/{STATE}"))
    hint = "it has no checkpoint yet, so"
    if checkpoints:
        hint = f"give its last checkpoint, model={checkpoints[-1]}, or"
    raise DirlError(f"{run} holds a run that has left no model: {hint} let it go on to its end with its own command")


def remove_if_empty(out: Path) -> None:
    """Remove a run directory that holds nothing but what a start writes."""
    if {path.name for path in out.iterdir()} <= BEGINNINGS:
        shutil.rmtree(out)


@contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
    """Keep other processes out of a directory, which is made if it is not there. Yields the open lock file.

    Raises DirlError where another process holds it, or where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
    except OSError as error:
        raise DirlError(f"{out} cannot be written ({error.strerror}): give another directory with out=…") from error
    with lock:
        if not take_lock(lock):
            raise DirlError(f"{out} is in use by another process: wait for it, or give this run a name=…")
        yield lock


def take_lock(lock: IO[str]) -> bool:
    """Take a lock, and keep it as long as its file stays open; False where others hold it for longer than a moment."""
    deadline = time.monotonic() + MOMENT
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.02)


def refuse_other(out: Path, config: str, said: Said) -> None:
    """Raises DirlError where the run in `out` has another configuration and is more than begun."""
    if not (out / "config.yaml").exists() or {path.name for path in out.iterdir()} <= BEGUN:
        return
    earlier = (out / "config.yaml").read_text(encoding="utf-8")
    changed = differences(flatten(earlier), flatten(config), said)
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise DirlError(
            f"{out} holds a run with another configuration ({', '.join(changed[:5])}{more}): "
            "give this one a name=… or out=…, or set that one aside with resume=never"
        )


def differences(old: dict[str, Any], new: dict[str, Any], said: Said) -> list[str]:
    """The differences between two configurations that matter, each as `key: old → new`."""
    lines = []
    for key in {**old, **new}:
        before = old.get(key, "absent")
        after = new.get(key, "absent")
        is_free = key in FREE or key.partition(".")[0] in FREE
        is_new = key not in old and not is_said(key, old, said)
        if before != after and not is_free and not is_new:
            lines.append(difference(key, null_or_text(before), null_or_text(after)))
    return lines


def difference(key: str, before: str, after: str) -> str:
    """A difference as it is told: classes by their names alone, where these differ."""
    old_name = before.rpartition(".")[2]
    new_name = after.rpartition(".")[2]
    if key.endswith("._target_") and old_name != new_name:
        return f"{key.removesuffix('._target_')}: {old_name} → {new_name}"
    return f"{key}: {before} → {after}"


def is_said(key: str, old: dict[str, Any], said: Said) -> bool:
    """Whether a key that the configuration `old` lacks has its value by the command line, and not by default."""
    parts = key.split(".")
    if len(parts) > 1 and parts[-2] in MAPPINGS:
        return True
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        # A choice within a group that was there brings new keys along; a group that was not there is said itself.
        was_there = any(name == part or name.startswith(f"{part}.") for name in old)
        if part in said.values or (part in said.choices and not was_there):
            return True
    return False


def null_or_text(value: object) -> str:
    return "null" if value is None else str(value)


def flatten(config: str) -> dict[str, Any]:
    """Full keys and their values, import paths as they are today."""
    settings = dict(leaves(OmegaConf.to_container(OmegaConf.create(config))))
    for key, value in settings.items():
        if key.endswith("_target_"):
            settings[key] = todays_target(value)
    return settings


def environment() -> dict[str, Any]:
    """Describe what a start of the run runs on, as JSON can hold it: command, versions, state of the checkout."""
    return {
        "command": redact(shlex.join(sys.orig_argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "git": git_state(Path(__file__).parents[3]),
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """The commit of a checkout and whether files differ from it; None for an installed package."""
    if not (checkout / ".git").exists():
        return None
    # Nothing of it may keep a run from starting: git may be missing, or refuse a checkout of another user.
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout)}
