"""Engines by their settings: what `rollout=` chooses among. Each starts on a loaded model."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import Annotated, Protocol
from urllib.parse import urlsplit

import torch

from dirl_cli import hub
from dirl_cli.diffusion.unmasking import BUILT_IN, REMEMBERING
from dirl_cli.errors import DirlError, pip_install
from dirl_cli.models.load import DiffusionLM
from dirl_cli.ranges import Count, OneOf, Positive, SomeShare
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.products import Products
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.rollout.server_client import KEY_VARIABLE, Patience, require_showable
from dirl_cli.rollout.server_pool import End, unknown_end
from dirl_cli.rollout.server_sampler import ServerSampler
from dirl_cli.rollout.weight_push import BroadcastPush, DiskPush, WeightPush, meeting_host
from dirl_cli.types import Decoding

LMDEPLOY = "0.18"
LMDEPLOY_MODELS = ("sdar", "sdar_moe")
ServedEngine = Annotated[str, OneOf("native", "lmdeploy", "sglang")]
PushWay = Annotated[str, OneOf("disk", "broadcast")]


class Engine(Protocol):
    """The settings of an engine, which can be started on a model. max_batch: sequences at once."""

    @property
    def max_batch(self) -> int: ...

    def require(self) -> None:
        """Raises DirlError for what this machine lacks: to be asked before a large model is loaded."""
        ...

    def start(self, lm: DiffusionLM, own_weights: bool = False) -> Sampler:
        """Start a sampler with the weights of `lm`. own_weights: nobody else uses these."""
        ...


@dataclass(frozen=True)
class Native:
    """This toolkit's own engine, on any device; see `NativeSampler`."""

    max_batch: Count
    products: Products
    cache_share: SomeShare
    record_entropy: bool = False

    def require(self) -> None:
        """It runs anywhere."""

    def start(self, lm: DiffusionLM, own_weights: bool = False) -> Sampler:
        return NativeSampler(
            lm,
            self.max_batch,
            own_weights=own_weights,
            products=self.products,
            cache_share=self.cache_share,
            record_entropy=self.record_entropy,
        )


@dataclass(frozen=True)
class Lmdeploy:
    """LMDeploy's PyTorch engine, in this process and on its GPU; see `start_engine` for cache_share."""

    max_batch: Count
    cache_share: SomeShare

    def require(self) -> None:
        """Raises DirlError where the package or a CUDA device is missing."""
        try:
            installed = version("lmdeploy")
        except PackageNotFoundError as error:
            raise DirlError(
                f"rollout=lmdeploy wants LMDeploy: {pip_install('lmdeploy')} in an environment with torch 2.12 or"
                " older, or leave rollout at native"
            ) from error
        if not installed.startswith(f"{LMDEPLOY}."):
            raise DirlError(f"rollout=lmdeploy wants LMDeploy {LMDEPLOY}, not {installed}: {pip_install('lmdeploy')}")
        if not torch.cuda.is_available():
            raise DirlError("rollout=lmdeploy wants a CUDA device and there is none: leave rollout at native")

    def start(self, lm: DiffusionLM, own_weights: bool = False) -> Sampler:
        """Start the engine, which copies the weights of `lm`.

        Raises DirlError like `require`, or for a model or device that LMDeploy cannot take.
        """
        self.require()
        if lm.model.config.model_type not in LMDEPLOY_MODELS or lm.logit_shift:
            raise DirlError(
                "rollout=lmdeploy samples from SDAR's family, which this model is not of: give rollout=native"
            )
        if lm.device.type != "cuda":
            raise DirlError(f"rollout=lmdeploy wants device=cuda, not {lm.device}: leave rollout at native")

        # Imported here, since LMDeploy is an optional package.
        with alone("lmdeploy"):
            from dirl_cli.rollout.lmdeploy import LmdeploySampler, start_engine

        torch.cuda.set_device(lm.device)  # the engine is built on, and wakes up on, the current one
        sampler = LmdeploySampler(lm, start_engine(lm, on_disk(lm), self.max_batch, self.cache_share))
        sampler.update_weights(lm.model.named_parameters(), 0)
        return sampler


@dataclass(frozen=True)
class Servers:
    """Servers (`dirl serve`, or SGLang's own) on any machines: see `ServerSampler`. url: their addresses.

    engine: what they sample with. servers: how many `dirl rl` starts by itself instead, not of SGLang. directory: in
    which weights are written. max_batch: answers that each process asks of a server at once. silence, push_timeout,
    patience: see `Patience`. push: whether servers read new weights from a disk, or are sent them. push_host: the
    address of this machine where they are sent; None for the one by which it reaches them.
    """

    url: tuple[str, ...]
    servers: Count | None
    engine: ServedEngine
    directory: str
    max_batch: Count
    silence: Positive
    push_timeout: Positive
    patience: Positive
    push: PushWay = "disk"
    push_host: str | None = None

    @property
    def is_sglang(self) -> bool:
        """Whether they are SGLang's own."""
        return self.engine == "sglang"

    @property
    def addresses(self) -> list[str]:
        """The addresses without what is the same in all."""
        return [url.rstrip("/") for url in self.url]

    def require(self) -> None:
        """Raises DirlError for addresses that are none."""
        if self.is_sglang and (self.servers or not self.url):
            raise DirlError(
                "rollout=sglang wants the addresses of SGLang's servers, which docs/sglang.md shows how to start: give"
                " rollout.url=[http://HOST:30000] and leave out rollout.servers"
            )
        self.require_push()
        if self.servers:
            raise DirlError("rollout.servers is of dirl rl: give rollout.url=[http://HOST:8000] of each `dirl serve`")
        if not self.url:
            raise DirlError(
                "rollout=server wants addresses: give rollout.url=[http://HOST:8000] of each `dirl serve`, or for"
                " dirl rl rollout.servers=N to start N of them"
            )
        for url in self.addresses:
            if "@" in url:  # which would be in the run's config.yaml, and would be shown instead of the key
                raise DirlError(f"rollout.url holds a name or a password before an @: give the key in {KEY_VARIABLE}")
            if not is_address(url):
                raise DirlError(f"rollout.url holds {url}: give addresses such as http://HOST:8000")
        if len(set(self.addresses)) < len(self.addresses):
            raise DirlError("rollout.url holds an address twice: give each server once")
        require_showable(os.environ.get(KEY_VARIABLE, ""))

    def require_push(self) -> None:
        """Raises DirlError for a way of giving servers weights that they do not have."""
        if self.is_sglang and self.push != "disk":
            raise DirlError(
                f"rollout.push={self.push} is for `dirl serve`, and SGLang's servers read weights from a disk: leave it"
                " at disk, and let rollout.directory be on one that they see"
            )
        if self.push_host and self.push == "disk":
            raise DirlError("rollout.push_host is where rollout.push=broadcast sends from: give both or neither")

    def start(self, lm: DiffusionLM, own_weights: bool = False, end: End = unknown_end) -> Sampler:
        """A sampler that has the weights of `lm` once it is given them, or asked before it is given any.

        end: see `ServerPool`.
        """
        self.require()
        patience = Patience(self.silence, self.push_timeout, self.patience)
        key = os.environ.get(KEY_VARIABLE)
        push: WeightPush = DiskPush()
        if self.push == "broadcast":
            push = BroadcastPush(self.push_host or meeting_host(self.addresses), self.push_timeout)
        return ServerSampler(
            lm, self.addresses, Path(self.directory), self.max_batch, patience, key, self.is_sglang, end, push
        )


def is_address(url: str) -> bool:
    """Whether it is that of a server and of nothing below it, such as http://HOST:8000."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is looked at only now
    except ValueError:
        return False
    has_more = parts.path or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not has_more


def strategies_of(engine: Engine) -> list[str]:
    """The built-in decoding strategies that an engine has."""
    if isinstance(engine, Lmdeploy):
        return [strategy for strategy in BUILT_IN if strategy not in REMEMBERING]
    return list(BUILT_IN)


def require_strategy(engine: Engine, decoding: Decoding) -> None:
    """Raises DirlError for a decoding strategy that the engine lacks: to be asked before a large model is loaded."""
    if isinstance(engine, Lmdeploy):
        require_forgetful(decoding)


def require_forgetful(decoding: Decoding) -> None:
    """Raises DirlError for a strategy that asks how sure the model was of what is revealed, which LMDeploy forgets."""
    if decoding.strategy in REMEMBERING:
        raise DirlError(
            f"decoding.strategy={decoding.strategy} wants rollout=native: LMDeploy does not keep how confident the"
            " model was of what a block has revealed"
        )


@contextmanager
def alone(task: str) -> Iterator[None]:
    """While no other process of this machine's user is at the same task.

    LMDeploy's first import is one: yapf, which it imports, moves the cache of its grammar into place before that is
    written, so that the process of another GPU would read half a file (seen with yapf 0.43).
    """
    with open(Path(gettempdir()) / f"dirl-{os.getuid()}-{task}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def on_disk(lm: DiffusionLM) -> str:
    """The directory of a checkpoint with the architecture of `lm`, whatever its weights; saved now if there is none."""
    source = lm.model.name_or_path
    config = lm.model.config
    if source:
        directory = source
        if not Path(source).is_dir():
            directory = str(hub.local_snapshot(source, "model"))

        # Merging an adapter may have untied the embeddings of `lm`.
        if type(config).from_pretrained(directory).tie_word_embeddings == config.tie_word_embeddings:
            return directory

    # LMDeploy builds its model from a directory; the weights in it are replaced by those of `lm` at once.
    saved = Path(mkdtemp()) / "model"
    lm.save(saved)
    return str(saved)
