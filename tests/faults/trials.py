"""Small runs in processes of their own, which may be killed, and what is to be the same at their end."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli import schema
from dirl_cli.commands import rl, serve, sft
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.tiny import Tiny
from dirl_cli.report.metrics_log import MetricsLog
from dirl_cli.training.stored_checkpoint import SUMS, complete_checkpoints

DATA = (
    "data.train=40",
    "data.held_out=4",
    "data.test=4",
    "eval_problems=2",
    "eval_every=3",
    "save_every=1",
    "log_every=1",
)
OWN = ("~experiment", "model=path")
SFT = (*OWN, *DATA, "batch_size=8", "optim.lr=1e-3", "decoding.max_new_tokens=4", "device=cpu", "steps=20")
RL = (*OWN, "+reward.weights={soft_overlong: 1.0}", "reward.workers=1", "rl.problems=2", "rl.group_size=3")
RL += ("rl.filter=reward", "decoding.max_new_tokens=12", f"decoding.stop_token_ids={[2, *range(10, 50)]}")
RL += ("+reward.options={soft_overlong: {cache: 12}}",)
RL += (*DATA, "optim.lr=1e-2", "schedule.warmup=0", "show_every=0", "device=cpu", "steps=6")
TRACEBACK = 70  # the exit code of a bug
SERVE = ("model=path", "device=cpu", "serve.key=none", "serve.max_length=256", "rollout.max_batch=1")
WORDS = {"sft": SFT, "rl": RL, "serve": SERVE}
COMMANDS = {"sft": sft.run, "rl": rl.run, "serve": serve.run}


def config(name: str, *words: str) -> DictConfig:
    """The configuration of a small run."""
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(name, [*WORDS[name], *words])
    OmegaConf.resolve(cfg)
    return cfg


def save_random_model(directory: Path, scale: float) -> str:
    """A model whose distributions are sharper the larger `scale`; returns the override."""
    lm = Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu", "sdpa")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    lm.save(directory / "model")
    return f"model.path={directory}/model"


def without_pictures() -> None:
    """Pictures would take most of the time of so small a run."""
    MetricsLog.draw = lambda *_: None


class Child:
    """A run in a process of its own. before: called there first."""

    def __init__(self, name: str, cfg: DictConfig, out: Path, before: Callable[[], object] = without_pictures) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.log = out.with_suffix(".log")
        self.began = time.perf_counter()
        sys.stdout.flush()
        self.pid = os.fork()  # a new interpreter would take seconds to import torch, each time
        if self.pid:
            return
        code = TRACEBACK
        with self.log.open("w", buffering=1) as sys.stdout:
            try:
                before()
                COMMANDS[name](cfg, out)
                code = 0
            except DirlError as error:
                print(error)
                code = error.exit_code
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, words: str) -> "Child":
        """Until the run has shown some words."""
        while not self.log.exists() or words not in self.told:
            assert not self.ends_within(0.002), self.told
        return self

    def ends_within(self, seconds: float) -> bool:
        """Whether the process ends so soon."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(0.001)
        return False

    def kill(self) -> bool:
        """Whether the kill came in time."""
        self.send(signal.SIGKILL)
        return self.end() == -signal.SIGKILL

    def end(self) -> int:
        """The exit code, or minus the signal that ended it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.seconds = time.perf_counter() - self.began
        return code

    @property
    def told(self) -> str:
        return self.log.read_text()


def result(out: Path) -> dict[str, object]:
    """What must not depend on any fault: model, checksums of the last checkpoint, rollouts, metrics but for times."""
    timed = ("time", "seconds/", "tokens_per_s")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    sums = complete_checkpoints(out / "checkpoints")[-1] / SUMS
    files = [*out.glob("model/*.safetensors"), out / "model/config.json", sums, *out.glob("rollouts/*")]
    found: dict[str, object] = {str(file.relative_to(out)): file.read_bytes() for file in files}
    found["metrics"] = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
    return found


def finished(name: str, cfg: DictConfig, out: Path) -> dict[str, object] | None:
    """The result of a run that is let go on to its end, if it gets there."""
    return result(out) if Child(name, cfg, out).end() == 0 else None
