"""What a server counts, in Prometheus' format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dirl_cli.serving.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # the upper ends of a histogram's bins


class ServerMetrics:
    """Counts of one server; what the engine knows is asked when somebody looks."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("dirl_answers", "Answers that ended, by why.", ["finish_reason"], registry=self.registry)
        self.dropped = Counter("dirl_dropped_answers", "Answers given up, by why.", ["reason"], registry=self.registry)
        self.refused = Counter("dirl_refused_requests", "Requests refused.", ["status"], registry=self.registry)
        self.prompt_tokens = Counter("dirl_prompt_tokens", "Tokens of prompts, of each once.", registry=self.registry)
        self.tokens = Counter("dirl_tokens", "Tokens that were revealed, whole blocks.", registry=self.registry)
        self.blocks = Counter("dirl_blocks", "Blocks that became full.", registry=self.registry)
        self.first_block = Histogram(
            "dirl_first_block_seconds",
            "From a request to the first block of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "dirl_answer_seconds", "From a request to the end of an answer.", buckets=SECONDS, registry=self.registry
        )
        self._gauge("dirl_running_answers", "Answers under way.", lambda: engine.state.running)
        self._gauge("dirl_waiting_answers", "Answers that have not begun.", lambda: engine.state.waiting)
        self._gauge("dirl_engine_steps", "Forwards of the engine so far.", lambda: engine.state.forwards)
        self._gauge("dirl_weights_version", "Version of the weights.", lambda: engine.state.weights.version)
        self._gauge("dirl_asleep", "1 while the engine sleeps.", lambda: engine.state.is_asleep)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(name, what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
