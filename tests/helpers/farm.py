"""Servers in the process of a test, and a sampler that asks them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock

from dirl_cli.rollout.server_client import Patience
from dirl_cli.rollout.server_sampler import DISK, ServerSampler
from dirl_cli.rollout.weight_push import WeightPush
from dirl_cli.serving import routes
from tests.helpers.flaky_network import Line, line_to
from tests.helpers.served import KEY, Served, listening, speaking_lm

PROMPTS = [[20, 30, 40], [50, 60, 70, 80], [90] * 9]
SEEDS = [2**62 + 1, 5, 6]
PATIENCE = Patience(silence=30, push=30, outage=30)


def read_one_by_one(monkeypatch) -> None:
    """Servers that share a process read new weights in turn: in it transformers loads one model at a time."""
    read_weights, loading = routes.read_weights, Lock()

    def read(*arguments):
        with loading:
            return read_weights(*arguments)

    monkeypatch.setattr(routes, "read_weights", read)


def answers_of(sampler, decoding, n=3):
    return {(prompt, i): answer for prompt, i, answer in sampler.stream(PROMPTS, n, decoding, seeds=SEEDS)}


@dataclass
class Farm:
    """Some servers, each behind a line, and a sampler that asks them."""

    sampler: ServerSampler
    servers: list[Served]
    lines: list[Line]

    def is_up(self, number: int) -> bool:
        return self.sampler.pool.servers[number].is_up


@contextmanager
def farm(
    lm,
    directory,
    count: int = 2,
    patience: Patience = PATIENCE,
    max_batch: int = 1,
    key: str = KEY,
    push: WeightPush = DISK,
) -> Iterator[Farm]:
    """Servers that begin with weights of their own."""
    with ExitStack() as stack:
        servers = []
        lines = []
        for seed in range(count):
            address, served, _ = stack.enter_context(listening(speaking_lm(seed), max_batch=max_batch))
            servers.append(served)
            lines.append(stack.enter_context(line_to(address)))
        urls = [line.address for line in lines]
        sampler = ServerSampler(lm, urls, directory / "weights", max_batch, patience, key, push=push)
        yield Farm(sampler, servers, lines)
