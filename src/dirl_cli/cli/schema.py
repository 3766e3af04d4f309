"""The types of the config keys of each command, and the functions that the config files may call.

The values are in conf/: a field here has a name and a type, which says what it may be. Groups with code behind them
carry their types in the dataclass that their `_target_` names.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dirl_cli.errors import DirlError
from dirl_cli.ranges import (
    Attention,
    Checkpointing,
    Compiling,
    Count,
    Device,
    Dtype,
    Natural,
    NotNegative,
    OneOf,
    Positive,
    Range,
    Seed,
    Share,
    ShareOrCount,
    SomeShare,
)
from dirl_cli.types import SHARDED_LAUNCHES, UNSHARDED_LAUNCHES, Decoding, Instruction

LAUNCHES = (*UNSHARDED_LAUNCHES, *SHARDED_LAUNCHES)
Limit = Annotated[float, Range(above=0, infinite=True, remark="inf switches it off")]  # of a gradient's length
LONGEST_NAME = 200  # bytes of a file name made of a path or an override; the disk allows 255, suffix included


@dataclass
class JobConfig:
    """Keys of every command that writes something: `out` is where, by default a directory called `name`."""

    seed: Seed
    name: str
    out: str


@dataclass
class PlanConfig:
    device: str | None
    length: Count | None
    tokens_per_forward: Positive | None


@dataclass
class RunConfig(JobConfig):
    """Keys of every command whose work is continued when the same command is given again."""

    gpus: Count
    nodes: Count
    node_rank: Natural | None
    main_address: str | None
    launch: Annotated[str, OneOf(*LAUNCHES)]
    prepare: bool
    resume: str
    dry_run: bool
    plan: PlanConfig
    price_per_gpu_hour: NotNegative | None


@dataclass
class TrainConfig(RunConfig):
    """Keys of every command that trains a model."""

    model: Any
    peft: Any
    data: Any
    optim: Any
    schedule: Any
    logger: Any
    steps: Count
    row_tokens: Count
    micro_rows: Count | None
    gradient_checkpointing: Checkpointing
    context_parallel: Count
    compile: Compiling
    clip_norm: Limit
    max_skipped: Natural
    skip_norm: Limit
    dtype: Dtype
    attention: Attention
    device: Device
    memory_gb: Positive | None
    log_every: Count
    eval_every: Natural
    eval_problems: Natural
    save_every: Natural
    keep_checkpoints: Natural
    keep_best: str | None
    async_checkpoints: bool
    push_to_hub: str | None
    instruction: Instruction = field(default_factory=Instruction, kw_only=True)
    decoding: Decoding = field(default_factory=Decoding, kw_only=True)


@dataclass
class SftConfig(TrainConfig):
    masking: Any
    annealing: Any
    certainty: NotNegative
    certainty_temperature: Positive
    batch_size: Count
    max_tokens: Count
    mask_rates: list[SomeShare]


def is_interval(values: Sequence[float]) -> bool:
    return len(values) == 2 and values[0] <= values[1]


@dataclass
class ReinforcementConfig:
    problems: Count
    group_size: Count
    mini_batches: Count
    epochs: Count
    filter: Annotated[str, OneOf("accuracy", "reward", "none")]
    max_rounds: Count
    max_prompt_tokens: Count | None
    curriculum: list[Share] | None
    curriculum_rest: Count
    hints: Natural
    hint_share: list[Share]
    hint_tokens: list[Count]
    async_rollout: Natural
    partial_rollouts: bool
    old: Annotated[str, OneOf("auto", "sampler", "trainer")]
    correction: Annotated[str, OneOf("truncate", "mask")]
    correction_cap: Annotated[float, Range(at_least=0, infinite=True, remark="0 is off")] | None
    correction_floor: NotNegative
    correction_level: Annotated[str, OneOf("token", "step", "sequence", "answer")]
    train_tail: bool
    rollout_only: bool
    compress_rollouts: bool
    replay: str | None
    rescore: bool

    def __post_init__(self) -> None:
        # What each key may be is in its type; here is which do not go together.
        if self.group_size < 2 and not (self.rollout_only or self.replay):
            raise DirlError(
                f"rl.group_size={self.group_size}: an answer is worth what it is beside the others to its problem,"
                " so give at least 2"
            )
        if self.mini_batches > self.problems and not self.replay:
            raise DirlError(
                f"rl.mini_batches={self.mini_batches}: there are at most rl.problems={self.problems} groups to cut into"
                " parts, so give no more"
            )
        if self.curriculum is not None and not is_interval(self.curriculum):
            raise DirlError(
                f"rl.curriculum={list(self.curriculum)}: give the lowest and the highest pass rate of what is asked,"
                " such as [0.1, 0.9]"
            )
        if self.curriculum is not None and self.replay:
            raise DirlError("rl.curriculum chooses what is asked, and rl.replay asks nothing: leave one out")
        if self.hints and self.hints >= self.group_size:
            raise DirlError(
                f"rl.hints={self.hints}: of rl.group_size={self.group_size} answers some must stay as they are, for the"
                " others to be compared with, so give less"
            )
        if not is_interval(self.hint_share):
            raise DirlError(
                f"rl.hint_share={list(self.hint_share)}: give the least and the largest share of a solution that is"
                " held, such as [0.2, 0.6]"
            )
        if not is_interval(self.hint_tokens):
            raise DirlError(
                f"rl.hint_tokens={list(self.hint_tokens)}: give the fewest and the most tokens of a chunk, such as"
                " [5, 10]"
            )
        if self.hints and self.replay:
            raise DirlError("rl.hints samples answers again, and rl.replay samples none: leave one out")
        if self.rescore and not self.replay:
            raise DirlError("rl.rescore rewards an earlier run's answers anew: say which with rl.replay=DIR")
        if self.async_rollout and (self.replay or self.rollout_only):
            raise DirlError("rl.async_rollout samples while it learns: leave rl.replay and rl.rollout_only out")
        if self.replay and self.rollout_only:
            raise DirlError("rl.replay learns without sampling and rl.rollout_only samples without learning: give one")


@dataclass
class RlConfig(TrainConfig):
    annealing: Any
    algo: Any
    critic: Any
    reward: Any
    rollout: Any
    rl: ReinforcementConfig
    show_every: Natural


@dataclass
class PreferenceConfig:
    pairs_from: str | None
    pairing: Annotated[str, OneOf("right_wrong", "best_worst")]
    pairs_per_problem: Count
    held_out: ShareOrCount
    link: Annotated[str, OneOf("sigmoid", "hinge", "ipo")]
    beta: Positive
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)]
    length_normalised: bool
    sft_weight: NotNegative
    train_tail: bool

    def __post_init__(self) -> None:
        if self.held_out and not self.pairs_from:
            raise DirlError("dpo.held_out is of the problems of dpo.pairs_from: of a file's pairs give data.held_out")


@dataclass
class DpoConfig(TrainConfig):
    likelihood: Any
    dpo: PreferenceConfig
    batch_size: Count
    max_tokens: Count


@dataclass
class HarnessConfig:
    likelihood: Annotated[str, OneOf("left_to_right", "elbo")]
    draws: Count
    rates: Count
    row_tokens: Count
    chat_template: bool
    fewshot: Natural | None
    max_new_tokens: Count
    tasks_from: str | None
    run_code: bool


@dataclass
class EvalConfig(RunConfig):
    model: Any
    bench: Any
    samples: Count
    limit: Count | None
    ids: list[str] | None
    predictions: str | None
    compare: list[str] | None
    rollout: Any
    dtype: Dtype
    attention: Attention
    device: Device
    grade_workers: Count | None
    grade_timeout: Positive
    harness: list[str] | None
    harness_settings: HarnessConfig
    data: Any = None  # of a benchmark that measures texts
    instruction: Instruction = field(default_factory=Instruction)
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class GenerateConfig(JobConfig):
    model: Any
    prompt: str | None
    messages: Any  # a list of turns, or the text of a JSON list, a file of one, or - for standard input
    input: str | None
    samples: Count
    watch: bool
    pace: NotNegative
    rollout: Any
    dtype: Dtype
    attention: Attention
    device: Device
    instruction: Instruction = field(default_factory=Instruction)
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class ChatConfig:
    model: Any
    seed: Seed
    pace: NotNegative
    rollout: Any
    dtype: Dtype
    attention: Attention
    device: Device
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class HttpConfig:
    host: str
    port: Annotated[int, Range(at_least=0, at_most=65535)]
    key: str | None
    name: str
    max_length: Count | None
    max_queue: Natural
    timeout: Positive
    grace: NotNegative
    max_body: Count


@dataclass
class ServeConfig:
    model: Any
    serve: HttpConfig
    rollout: Any
    dtype: Dtype
    attention: Attention
    device: Device
    decoding: Decoding = field(default_factory=Decoding)


@dataclass
class MergeConfig:
    model: Any
    to: str
    dtype: Dtype
    push_to_hub: str | None


@dataclass
class ViewConfig:
    answers: list[str]
    to: str
    limit: Count
    export: str | None
    number: Count
    serve: bool
    port: Annotated[int, Range(at_least=0, at_most=65535)]
    model: Any = None


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
    "dpo": DpoConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "merge": MergeConfig,
    "view": ViewConfig,
    "download": DownloadConfig,
}


@cache
def register() -> None:
    """Make the schemas known to Hydra as NAME_schema, and the functions to the config files."""
    for name, kind in SCHEMAS.items():
        node = OmegaConf.structured(kind)
        for group in {"decoding", "instruction"} & node.keys():
            OmegaConf.set_readonly(node[group], None)  # OmegaConf takes a frozen dataclass for a constant
        ConfigStore.instance().store(f"{name}_schema", node)
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("asked", asked, replace=True)
    OmegaConf.register_new_resolver("joined", joined_name, replace=True)


def asked(tasks: Sequence[str] | None, bench: str) -> str:
    """What an evaluation asks, as part of its name: tasks of lm-evaluation-harness, or a benchmark."""
    return "-".join(tasks) if tasks else bench


def joined_name(texts: Sequence[str]) -> str:
    """Several texts as part of a name."""
    return "-".join(texts)


def slug(*texts: str | None) -> str:
    """The first text that is not empty, a path or an override, as a file name: `../data/my a.jsonl` is `data-my-a`."""
    text = next((text for text in texts if text), "")
    folders = [folder for folder in re.split(r"[/\\]", text) if folder not in ("", ".", "..")]
    name = re.sub(r"\.(json|jsonl|parquet)(\.gz)?$", "", "-".join(folders))
    name = re.sub(r"[^\w.,=+-]+", "", name.replace(" ", "-"))

    # A digest tells apart what is too long for a name, or of which no letter is left.
    is_empty = bool(text) and not name.strip(".")
    if not is_empty and len(name.encode()) <= LONGEST_NAME:
        return name
    hashed = text if is_empty else name
    digest = hashlib.sha256(hashed.encode(errors="replace")).hexdigest()[:8]
    return f"{name.strip('.').encode()[: LONGEST_NAME - 20].decode(errors='ignore')}-{digest}".lstrip("-")


register()  # at import, since sweeps compose in other processes too (joblib, SLURM)
