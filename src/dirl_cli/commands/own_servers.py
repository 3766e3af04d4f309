"""Servers that a run starts for itself, on the GPUs after its own: what they are told, their start and their end."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.commands.problems import Pools
from dirl_cli.commands.rl_parts import RlParts
from dirl_cli.commands.start import planned_machine, shapes_of
from dirl_cli.distributed import first_tells, is_first_of_group
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir, write_text
from dirl_cli.models.load import DiffusionLM, pick_device
from dirl_cli.plan.eval_forecast import eval_budget
from dirl_cli.plan.time import NOTHING_ASSUMED
from dirl_cli.report.progress import StepProgress
from dirl_cli.rollout.engines import Engine, Servers
from dirl_cli.rollout.server_client import KEY_VARIABLE
from dirl_cli.rollout.server_keeper import ServerKeeper
from dirl_cli.rollout.server_processes import gpus_of_servers, server_environment, wait_for_servers
from dirl_cli.text import counted
from dirl_cli.types import Decoding

DAY = 86400  # seconds that a server may take for a group: the run itself sees whether it hangs


@contextmanager
def own_servers(
    cfg: DictConfig, out: Path, parts: RlParts, pools: Pools, progress: StepProgress
) -> Iterator[ServerKeeper]:
    """Keeps the servers that rollout.servers asks for, while they load the model, until the end of the block.

    The first process of the run starts them; others have none, and of another engine no process has.
    Raises DirlError for what this machine lacks, be it of another engine.
    """
    engine = parts.engine
    if not (isinstance(engine, Servers) and engine.servers):
        engine.require()
        yield ServerKeeper()
        return

    gpus: list[str | None] = [None] * engine.servers
    if pick_device(cfg.device) != "cpu":
        gpus = [*gpus_of_servers(cfg.gpus, engine.servers, os.environ)]

    with ExitStack() as stack:
        stack.callback(set_key, os.environ.get(KEY_VARIABLE))
        keeper = stack.enter_context(ServerKeeper())
        if is_first_of_group():
            set_key(secrets.token_urlsafe(24))
            config = OmegaConf.to_yaml(server_config(cfg, engine, served_tokens(cfg, parts, pools)))
            shutil.rmtree(out / "servers", ignore_errors=True)  # an earlier start's
            progress.print_line(f"starting {counted(len(gpus), 'server')}, whose logs are in {out / 'servers'}")
            for number, gpu in enumerate(gpus):
                directory = out / "servers" / str(number)
                write_text(directory / "config.yaml", config)
                keeper.start(directory, server_environment(os.environ, gpu))
        yield keeper


def ready_engine(engine: Engine, keeper: ServerKeeper, progress: StepProgress) -> Engine:
    """The engine that samples: with the addresses of servers of its own, once they answer, which are kept from then on.

    Every process of the run has to call, and is told the servers' key too. Raises DirlError where one does not answer.
    """
    if not (isinstance(engine, Servers) and engine.servers):
        return engine
    outcome: tuple[list[str], str] | DirlError = ([], "")
    if is_first_of_group():
        try:
            with progress.working("waiting for the servers to load the model"):
                outcome = wait_for_servers(keeper.servers, engine.patience), os.environ[KEY_VARIABLE]
            keeper.watch()
        except DirlError as error:
            outcome = error

    outcome = first_tells(outcome)
    if isinstance(outcome, DirlError):
        raise outcome
    urls, key = outcome
    set_key(key)
    return replace(engine, url=tuple(urls), servers=None)


def require_servers(engine: Engine, nodes: int) -> None:
    """Raises DirlError for servers that this run cannot have: to be asked before the data are read."""
    if isinstance(engine, Servers) and engine.servers:
        require_no_others(engine, nodes)
    elif isinstance(engine, Servers):
        engine.require()


def require_no_others(engine: Servers, nodes: int) -> None:
    """Raises DirlError where the run has other servers too, or machines that do not see this one's."""
    if engine.is_sglang:
        engine.require()
    engine.require_push()
    if engine.url:
        raise DirlError("rollout.servers starts servers and rollout.url has others: give one of the two")
    if nodes > 1:
        raise DirlError(
            f"rollout.servers starts servers for this machine alone, and nodes={nodes}: start them with `srun dirl"
            " serve`, as docs/several_machines.md shows, and give rollout.url"
        )


def served_tokens(cfg: DictConfig, parts: RlParts, pools: Pools) -> int:
    """The tokens of the longest prompt and its answer, and a block more, since servers have room for whole blocks."""
    longest = max(map(len, pools.held_out.prompts), default=0)
    block_size = shapes_of(cfg, parts.model).block_size
    return max(longest, pools.longest_prompt) + parts.decoding.max_new_tokens + block_size


def server_config(cfg: DictConfig, engine: Servers, tokens: int) -> DictConfig:
    """The configuration of a server of the run's model, at a port of this machine that is free when it starts.

    tokens: of a prompt and its answer.
    """
    served = OmegaConf.load(conf_dir() / "serve.yaml").serve
    served.update({"host": "127.0.0.1", "port": 0, "max_length": tokens, "timeout": DAY})
    served.max_queue += cfg.gpus * engine.max_batch  # what every process asks at once may wait
    rollout = engine_of_server(engine)
    same = {key: cfg[key] for key in ("model", "decoding", "dtype", "attention", "device")}
    return OmegaConf.create({**same, "serve": served, "rollout": rollout})


def engine_of_server(engine: Servers) -> DictConfig:
    """The settings of what a server samples with."""
    rollout = OmegaConf.load(conf_dir() / "rollout" / f"{engine.engine}.yaml")
    rollout.max_batch = engine.max_batch
    return DictConfig(rollout)


def servers_plan(cfg: DictConfig, engine: Servers, lm: DiffusionLM, decoding: Decoding, longest_prompt: int) -> str:
    """What the servers of a run take, in words, as far as they are its own. longest_prompt: tokens."""
    if not engine.servers:
        return "what servers take, in memory and time, is theirs and not in this plan"
    served = engine_of_server(engine)
    settings = {
        "rollout.max_batch": engine.max_batch,
        "rollout.cache_share": served.cache_share,
        "rollout.products": served.get("products"),
        "decoding.max_new_tokens": decoding.max_new_tokens,
    }
    # Each has a GPU of its own; on a CPU all share the memory, with the processes that learn.
    machine = planned_machine(cfg, cfg.memory_gb)
    is_gpu = machine.kind == "cuda"
    machine = replace(machine, gpus=1 if is_gpu else machine.gpus + engine.servers)
    prompts = [[0] * longest_prompt] * (1 if is_gpu else machine.gpus)
    sampler = build(served)
    budget = eval_budget(lm, machine, settings, sampler, decoding, prompts, engine.max_batch, NOTHING_ASSUMED)
    gpus = f" on {counted(engine.servers, 'GPU')} after the run's own" if is_gpu else ""
    servers = counted(engine.servers, "server")
    return f"{servers}{gpus}, whose hours are not in this plan; of each, {budget.verdict()}"


def set_key(key: str | None) -> None:
    """Have this process show servers a key, which it takes from its environment; None for no key."""
    if key is None:
        os.environ.pop(KEY_VARIABLE, None)
    else:
        os.environ[KEY_VARIABLE] = key
