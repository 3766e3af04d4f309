"""`dirl serve`: answer requests over HTTP, in OpenAI's format."""

import os
import secrets
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from omegaconf import DictConfig

from dirl_cli.cli.build import build
from dirl_cli.console import PlainConsole, working
from dirl_cli.diffusion.unmasking import find_strategy
from dirl_cli.distributed import cores
from dirl_cli.errors import DirlError, Stopped, pip_install, stop_code
from dirl_cli.files import write_text
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.shapes import shapes
from dirl_cli.rollout.engines import Native, Servers, require_strategy, strategies_of
from dirl_cli.rollout.server_client import KEY_VARIABLE
from dirl_cli.rollout.server_processes import ADDRESS
from dirl_cli.types import Decoding

if TYPE_CHECKING:
    from dirl_cli.serving.engine_thread import EngineThread

PACKAGES = ("prometheus_client", "starlette", "uvicorn")


def run(cfg: DictConfig, out: Path | None) -> None:
    """Serve cfg.model until a signal: SIGTERM, or Ctrl-C. out: where a run whose server it is looks for its address."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise DirlError(f"dirl serve wants {' and '.join(missing)}: {pip_install('serve')}")
    key, is_new = key_of(cfg.serve)

    # Imported here, since what they import is optional.
    from dirl_cli.serving.engine_process import EngineProcess
    from dirl_cli.serving.listen import StoppingServer, address_of, listener_at
    from dirl_cli.serving.request_body import RequestReader
    from dirl_cli.serving.routes import Routes
    from dirl_cli.serving.service import Limits, Service

    # A port that is taken and a package that is missing are told before the model takes its time to load.
    console = PlainConsole(soft_wrap=True)
    settings = cfg.serve
    rollout = build(cfg.rollout)
    if isinstance(rollout, Servers):
        raise DirlError("rollout=server asks servers, and this is one: give rollout=native or rollout=lmdeploy")
    if isinstance(rollout, Native) and rollout.record_entropy:
        raise DirlError(
            "a server's answers hold no entropies: leave rollout.record_entropy out, or use `dirl generate`"
        )
    decoding = build(cfg.decoding, Decoding)
    require_strategy(rollout, decoding)
    find_strategy(decoding.strategy)
    rollout.require()
    listener = listener_at(settings.host, earlier_port(out) or settings.port)
    lm = shapes(build(cfg.model), cfg.attention)  # what requests are read by; the engine has the weights
    lm.require_tokenizer()
    require_own_block_size(decoding, lm)
    with EngineProcess(partial(begin_engine, cfg, served_length(settings.max_length, lm))) as engine:
        with working(console, "loading the model"):
            slots, length = engine.start()

        most_answers = slots + settings.max_queue
        reader = RequestReader(lm, settings.name, decoding, length - 1, most_answers, strategies_of(rollout))
        limits = Limits(settings.max_queue, settings.timeout, settings.grace, settings.max_body)
        service = Service(engine, reader, limits, slots)
        server = StoppingServer(Routes(service, key).app(), service)
        console.print(
            f"{settings.name} is at {address_of(listener)}/v1: {slots} answers at once, prompt and answer of up to"
            f" {length} tokens"
        )
        if is_new:
            print(f"key: {key}", flush=True)
        if out:
            write_text(out / ADDRESS, address_of(listener))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt as interrupt:
            code = stop_code(interrupt)
            raise Stopped("stopped: what was under way is finished or given back", code) from None
        if engine.ended.done():
            engine.ended.result()  # raises what ended the engine


def begin_engine(cfg: DictConfig, length: int) -> "EngineThread":
    """Load the model and its engine, in the engine's process. length: tokens of a prompt and its answer."""
    from dirl_cli.serving.engine_thread import EngineThread

    rollout = build(cfg.rollout)
    lm: DiffusionLM = build(cfg.model).load(cfg.dtype, cfg.device, cfg.attention)
    if lm.device.type == "cpu":
        leave_a_core()
    own_weights = isinstance(rollout, Native) and lm.device.type == "cuda"
    return EngineThread(rollout.start(lm, own_weights), length, own_weights)


def leave_a_core() -> None:
    """Compute with a thread less than there are cores, one of which answers HTTP.

    Threads that share each product wait for the slowest, which without a core is far behind: on two cores, two of them
    under load are slower than one.
    """
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores() - 1)))


def key_of(settings: Any) -> tuple[str | None, bool]:
    """The key that clients have to show, None for none; and whether it is new, so that it has to be told.

    Raises DirlError for a server without one that other machines reach.
    """
    if settings.key == "none":
        if not is_loopback(settings.host):
            raise DirlError(
                f"serve.host={settings.host} lets other machines in, and serve.key=none all of them: give a key in"
                f" {KEY_VARIABLE}, or serve.host=127.0.0.1"
            )
        return None, False
    key = settings.key or os.environ.get(KEY_VARIABLE)
    if key:
        return key, False
    return secrets.token_urlsafe(24), True


def earlier_port(out: Path | None) -> int | None:
    """The port of an earlier start in the same directory, by which the run that started it knows it."""
    if out is None or not (out / ADDRESS).exists():
        return None
    return urlsplit((out / ADDRESS).read_text()).port


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_own_block_size(decoding: Decoding, lm: DiffusionLM) -> None:
    """Raises DirlError for blocks of another size than the model's, in which nothing would be answered."""
    if decoding.block_size not in (None, lm.block_size):
        raise DirlError(
            f"decoding.block_size is {decoding.block_size} and the model's is {lm.block_size}: leave it out"
        )


def served_length(max_length: int | None, lm: DiffusionLM) -> int:
    """The tokens that a prompt and its answer may have: whole blocks, no more than the model has positions.

    Raises DirlError where that is no block.
    """
    longest = lm.longest_prompt + 1
    length = min(max_length or longest, longest) // lm.block_size * lm.block_size
    if length < 1:
        raise DirlError(f"serve.max_length={max_length} is less than a block of {lm.block_size} tokens: give more")
    return length
