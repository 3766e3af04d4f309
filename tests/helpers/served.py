"""A server in the process of a test: asked without a network, or at a real port."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from starlette.testclient import TestClient

from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.serving.engine_thread import EngineThread
from dirl_cli.serving.listen import StoppingServer, address_of, listener_at
from dirl_cli.serving.request_body import RequestReader
from dirl_cli.serving.routes import Routes
from dirl_cli.serving.service import Limits, Service
from dirl_cli.types import Decoding

KEY = "the key"
LENGTH = 128


def speaking_lm(seed: int = 0) -> DiffusionLM:
    """A random model of one layer with a tokenizer, whose distributions are sharp enough to have favourites."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 256}
    lm = Tiny(**sizes, seed=seed).load("float32", "cpu", "sdpa")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return lm


@dataclass
class Gate:
    """Holds an engine before its next step as long as it is shut.

    shuts_itself: as soon as an answer is whole, so that the others are owed for sure.
    """

    open: threading.Event
    shuts_itself: bool = False

    def shut(self) -> None:
        self.open.clear()


@dataclass
class Served:
    """A server's parts. client: asks it without a network."""

    service: Service
    engine: EngineThread
    client: TestClient
    gate: Gate


def service_of(lm: DiffusionLM, decoding: Decoding, max_batch: int, limits: dict) -> tuple[Service, Gate]:
    engine = EngineThread(NativeSampler(lm, max_batch), LENGTH)
    gate = Gate(threading.Event())
    gate.open.set()
    step = engine._step

    def held_step() -> None:
        gate.open.wait(30)
        answers = len(engine.running)
        step()
        if gate.shuts_itself and len(engine.running) < answers:
            gate.shut()

    engine._step = held_step  # type: ignore[method-assign]
    slots, length = engine.start()
    settings = {"max_queue": 8, "timeout": 60.0, "grace": 30.0, "max_body": 1} | limits
    reader = RequestReader(lm, "tiny", decoding, length - 1, slots + settings["max_queue"])
    return Service(engine, reader, Limits(**settings), slots), gate


@contextmanager
def served(
    lm: DiffusionLM, decoding: Decoding | None = None, max_batch: int = 4, key: str | None = KEY, **limits: float
) -> Iterator[Served]:
    """A server that answers calls of `client`."""
    service, gate = service_of(lm, decoding or Decoding(max_new_tokens=16), max_batch, limits)
    app = Routes(service, key).app()
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    try:
        with TestClient(app, headers=headers) as client:
            yield Served(service, service.engine, client, gate)
    finally:
        gate.open.set()
        service.engine.stop()
        service.engine.thread.join(30)


@contextmanager
def listening(
    lm: DiffusionLM, decoding: Decoding | None = None, max_batch: int = 4, key: str | None = KEY, **limits: float
) -> Iterator[tuple[str, Served, StoppingServer]]:
    """A server at a real port, in a thread: its address."""
    service, gate = service_of(lm, decoding or Decoding(max_new_tokens=16), max_batch, limits)
    listener = listener_at("127.0.0.1", 0)
    address = address_of(listener)
    server = StoppingServer(Routes(service, key).app(), service)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield address, Served(service, service.engine, None, gate), server  # type: ignore[arg-type]
    finally:
        gate.open.set()
        server.should_exit = True
        thread.join(60)
        service.engine.stop()
        service.engine.thread.join(30)


def wait_until(is_so: Callable[[], object], seconds: float = 30) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)
