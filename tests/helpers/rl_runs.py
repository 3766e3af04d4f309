"""Small runs of `dirl rl`, and what they leave."""

import json
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli import schema
from dirl_cli.commands import rl
from dirl_cli.files import conf_dir
from dirl_cli.models.tiny import Tiny

# A random model answers nothing right, so answers are rewarded for ending early, at any of many tokens.
LEARNING = (
    "model=path",
    "+reward.weights={soft_overlong: 1.0}",
    "+reward.options={soft_overlong: {cache: 12}}",
    "reward.workers=1",
    "reward.timeout=100",  # what a busy machine grades is graded, not given up
    "rl.problems=2",
    "rl.group_size=3",
    "rl.filter=reward",
    "rl.mini_batches=1",
    f"decoding.stop_token_ids={[2, *range(10, 50)]}",
    "optim.lr=1e-2",
    "schedule.warmup=0",
)
SMALL = (
    "~experiment",
    *LEARNING,
    "decoding.max_new_tokens=12",
    "steps=4",
    "save_every=2",
    "log_every=1",
    "show_every=2",
    "eval_problems=2",
    "device=cpu",
)


UPDATE = ("loss", "grad_norm", "entropy", "ratio", "token_forwards")


def save_sharp_model(directory: Path, seed: int = 0, block_size: int = 4) -> Path:
    """Save a random model whose distributions are sharp enough for its answers to differ in length."""
    tiny = Tiny(block_size=block_size, hidden_size=32, num_hidden_layers=1, intermediate_size=32, seed=seed)
    lm = tiny.load("float32", "cpu", "sdpa")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    lm.save(directory)
    return directory


ARITHMETIC = ("data.train=40", "data.held_out=4", "data.test=4")


def config(model: Path, *words: str) -> DictConfig:
    own = () if "data=file" in words else ARITHMETIC
    return composed("rl", *SMALL, *own, f"model.path={model}", *words)


def composed(command: str, *words: str) -> DictConfig:
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, list(words))
    OmegaConf.resolve(cfg)
    return cfg


def run(cfg: DictConfig, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rl.run(cfg, out)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


def updates(out: Path) -> list[list[float | None]]:
    return [[line.get(name) for name in UPDATE] for line in lines(out)]
