"""The types of what commands read beside their groups, and the functions that the config files may call.

The values are in conf/: a field here has a name and a type. Groups with code behind them carry their types in the
dataclass that their `_target_` names.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dirl_cli.types import Decoding, Instruction

LONGEST_NAME = 200  # bytes of a file name made of a path or an override; the disk allows 255, suffix included


@dataclass
class JobConfig:
    """Of every command that writes something: `out` is where, by default a directory called `name`."""

    seed: int
    name: str
    out: str


@dataclass
class RunConfig(JobConfig):
    """Of every command whose work is continued when the same command is given again."""

    gpus: int
    nodes: int
    node_rank: int | None
    main_address: str | None
    launch: str
    prepare: bool
    resume: str


@dataclass
class TrainConfig(RunConfig):
    """Of both commands that train a model."""

    model: Any
    peft: Any
    data: Any
    optim: Any
    schedule: Any
    logger: Any
    steps: int
    row_tokens: int
    micro_rows: int | None
    gradient_checkpointing: bool
    clip_norm: float
    max_skipped: int
    skip_norm: float
    dtype: str
    attention: str
    device: str
    memory_gb: float | None
    log_every: int
    eval_every: int
    eval_problems: int
    save_every: int
    keep_checkpoints: int
    keep_best: str | None
    async_checkpoints: bool
    dry_run: bool
    push_to_hub: str | None
    instruction: Instruction = field(default_factory=Instruction, kw_only=True)
    decoding: Decoding = field(default_factory=Decoding, kw_only=True)


@dataclass
class SftConfig(TrainConfig):
    masking: Any
    annealing: Any
    batch_size: int
    max_tokens: int
    mask_rates: list[float]


@dataclass
class ReinforcementConfig:
    problems: int
    group_size: int
    mini_batches: int
    epochs: int
    filter: str
    max_rounds: int
    max_prompt_tokens: int | None
    async_rollout: bool
    old: str
    correction_cap: float | None
    train_tail: bool
    rollout_only: bool
    replay: str | None
    rescore: bool


@dataclass
class RlConfig(TrainConfig):
    algo: Any
    reward: Any
    rollout: Any
    rl: ReinforcementConfig
    show_every: int


@dataclass
class EvalConfig(RunConfig):
    model: Any
    bench: Any
    samples: int
    limit: int | None
    ids: list[str] | None
    predictions: str | None
    compare: list[str] | None
    rollout: Any
    dtype: str
    attention: str
    device: str
    grade_workers: int | None
    grade_timeout: float
    instruction: Instruction = field(default_factory=Instruction)
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class GenerateConfig(JobConfig):
    model: Any
    prompt: str | None
    messages: Any  # a list of turns, or the text of a JSON list, a file of one, or - for standard input
    input: str | None
    samples: int
    watch: bool
    pace: float
    rollout: Any
    dtype: str
    attention: str
    device: str
    instruction: Instruction = field(default_factory=Instruction)
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class MergeConfig:
    model: Any
    to: str
    dtype: str
    push_to_hub: str | None


@dataclass
class DownloadConfig:
    ids: list[str]
    to: str | None
    dry_run: bool
    model: Any = None
    data: Any = None
    bench: Any = None


SCHEMAS = {
    "sft": SftConfig,
    "rl": RlConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
    "merge": MergeConfig,
    "download": DownloadConfig,
}


def register() -> None:
    """Make the schemas known to Hydra as NAME_schema, and the functions to the config files."""
    for name, kind in SCHEMAS.items():
        node = OmegaConf.structured(kind)
        for group in {"decoding", "instruction"} & node.keys():
            OmegaConf.set_readonly(node[group], None)  # OmegaConf takes a frozen dataclass for a constant
        ConfigStore.instance().store(f"{name}_schema", node)
    OmegaConf.register_new_resolver("slug", slug, replace=True)


def slug(*texts: str | None) -> str:
    """A path or an override, the first that there is, as one file name: `../data/my a.jsonl` becomes `data-my-a`."""
    text = next((text for text in texts if text), "")
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".", "..")]
    name = re.sub(r"\.(json|jsonl|parquet)(\.gz)?$", "", "-".join(parts))
    name = re.sub(r"[^\w.,=+-]+", "", name.replace(" ", "-"))
    whole = name if name.strip(".") or not text else text
    if whole is name and len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(whole.encode(errors="replace")).hexdigest()[:8]
    return f"{name.strip('.').encode()[: LONGEST_NAME - 20].decode(errors='ignore')}-{digest}".lstrip("-")


register()  # at import, since sweeps compose in other processes too (joblib, SLURM)
