"""Between HTTP and the engine: who is let in, what becomes of answers, and how a server stops."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from dirl_cli.ranges import Count, Natural, NotNegative, Positive
from dirl_cli.rollout.sampler import GivenUp, NewBlock
from dirl_cli.serving.engine import ASLEEP, STOPPING, Engine, OtherWeights, Query, other_weights
from dirl_cli.serving.growing_text import GrowingText
from dirl_cli.serving.refusals import Refusal
from dirl_cli.serving.request_body import Asked, RequestReader
from dirl_cli.serving.server_metrics import ServerMetrics
from dirl_cli.types import Trajectory

LONGEST_PAUSE = 60  # seconds that a client is told to wait at most


@dataclass(frozen=True)
class Limits:
    """What a server bears.

    max_queue: answers that wait while others are under way. timeout: seconds that a request may take. grace: seconds
    that answers under way have once the server stops. max_body: megabytes of a request.
    """

    max_queue: Natural
    timeout: Positive
    grace: NotNegative
    max_body: Count


@dataclass
class AnswerState:
    """One of the answers that a request asks for. index: among its choices. new: text that its last block added."""

    index: int
    text: GrowingText
    trajectory: Trajectory
    new: str = ""
    last_block: NewBlock | None = None

    @property
    def is_over(self) -> bool:
        return self.text.finish_reason is not None

    def add(self, block: NewBlock) -> bool:
        """Grow by a block; returns whether it is over."""
        self.last_block = block
        self.new = self.text.grow(block.token_ids, is_last=block.stop_reason is not None)

        # Its lists grow in place: a copy for each block would take time that is quadratic in their number.
        self.trajectory.token_ids.extend(block.token_ids)
        self.trajectory.reveal_step.extend(block.reveal_step)
        self.trajectory.logprobs.extend(block.logprobs)
        self.trajectory = replace(
            self.trajectory,
            stop_reason=block.stop_reason or self.text.finish_reason or "length",
            denoise_forwards=block.denoise_forwards,
            forwards=block.forwards,
            weights_version=block.weights_version,
        )
        return self.is_over


@dataclass(eq=False)
class OpenAnswers:
    """The answers of a request that was let in: the indices of those that count as open, and what came of them.

    In the loop's thread.
    """

    indices: set[int]
    events: asyncio.Queue[tuple[int, NewBlock | GivenUp]] = field(default_factory=asyncio.Queue)


class Service:
    """Answers what `RequestReader` has read, on `engine`. slots: answers that are under way at once."""

    def __init__(self, engine: Engine, reader: RequestReader, limits: Limits, slots: int) -> None:
        self.engine = engine
        self.reader = reader
        self.limits = limits
        self.slots = slots
        self.capacity = reader.most_answers
        self.metrics = ServerMetrics(engine)
        self.open_answers = 0
        self.mean_seconds = 1.0  # of an answer, the last ones counting most
        self.is_stopping = False

    def admit(self, asked: Asked) -> OpenAnswers:
        """Let a request in: its answers count as open until `answers` is through with them, or `leave`.

        Raises Refusal where it is not let in now: over, stopping, asleep, of other weights than it is asked of, or more
        than there is room for.
        """
        if self.engine.ended.done():
            raise Refusal(503, self.engine.end)
        if self.is_stopping:
            raise Refusal(503, STOPPING, headers={"Retry-After": str(LONGEST_PAUSE)})
        if self.engine.state.is_asleep:
            raise Refusal(503, ASLEEP)
        if reason := other_weights(asked.weights, self.engine.state.weights):
            raise Refusal(409, f"{reason}: POST /update_weights first", "weights")
        count = len(asked.prompts) * asked.n
        if self.open_answers + count > self.capacity:
            pause = min(max(round(self.mean_seconds * self.open_answers / self.slots), 1), LONGEST_PAUSE)
            raise Refusal(
                429,
                f"{self.open_answers} answers of at most {self.capacity} are under way or wait: ask again in {pause} s",
                headers={"Retry-After": str(pause)},
            )
        self.open_answers += count
        return OpenAnswers(set(range(count)))

    def leave(self, open_answers: OpenAnswers) -> None:
        """Count what is still open of a request no more: nobody will ask for it."""
        self._count_dropped(open_answers, "hung_up")
        for index in list(open_answers.indices):
            self._close(open_answers, index)

    async def answers(self, asked: Asked, open_answers: OpenAnswers) -> AsyncGenerator[AnswerState, None]:
        """Yield an answer each time that it has grown, until all are over; what is left at the end is withdrawn.

        Raises Refusal where the request takes longer than it may, or its answers are given back.
        """
        began = time.monotonic()
        queries = self._ask(asked, open_answers)
        states = [self._state(asked, index) for index in range(len(asked.prompts) * asked.n)]
        reason = "hung_up"
        try:
            while not all(state.is_over for state in states):
                left = began + self.limits.timeout - time.monotonic()
                try:
                    async with asyncio.timeout(max(left, 0)):
                        index, news = await open_answers.events.get()
                except TimeoutError:
                    reason = "timeout"
                    raise Refusal(
                        504,
                        f"the answer takes longer than {self.limits.timeout:g} s: ask for fewer tokens, or raise"
                        " serve.timeout",
                    ) from None
                if isinstance(news, GivenUp):
                    reason = "given_back"
                    self.metrics.dropped.labels(reason).inc()
                    if isinstance(news, OtherWeights):
                        raise Refusal(409, f"{news.reason}: POST /update_weights first", "weights")
                    raise Refusal(503, news.reason, headers={"Retry-After": "1"})

                state = states[index]
                if state.is_over:
                    continue  # what the engine did before it heard that the text is complete
                has_ended = state.add(news)
                self._count(state, news, time.monotonic() - began)
                if has_ended and index in open_answers.indices:
                    self._withdraw(queries, open_answers, [index], asked)
                yield state
        finally:
            self._count_dropped(open_answers, reason)
            self._withdraw(queries, open_answers, sorted(open_answers.indices), asked)

    def begin_stop(self) -> None:
        """Let nobody in any more, give back what has not begun, and after the grace what has not ended."""
        if self.is_stopping:
            return
        self.is_stopping = True
        self.engine.refuse_waiting()
        asyncio.get_running_loop().call_later(self.limits.grace, self.engine.drop_running)

    def _ask(self, asked: Asked, open_answers: OpenAnswers) -> list[Query]:
        """Leave a request's queries with the engine, one a prompt."""
        loop = asyncio.get_running_loop()
        queries = []
        for number, prompt_ids in enumerate(asked.prompts):
            first = number * asked.n

            def deliver(news: NewBlock | GivenUp, first: int = first) -> None:
                with suppress(RuntimeError):  # of a loop that is over: nobody listens any more
                    loop.call_soon_threadsafe(self._receive, open_answers, first + news.sample - asked.first, news)

            samples = range(asked.first, asked.first + asked.n)
            query = Query(prompt_ids, samples, asked.decoding, deliver, asked.weights, asked.answer_ids)
            queries.append(query)
            self.metrics.prompt_tokens.inc(len(prompt_ids))
            self.engine.submit(query)
        return queries

    def _receive(self, open_answers: OpenAnswers, index: int, news: NewBlock | GivenUp) -> None:
        """Take what the engine delivers. Its slot counts as free even where nobody reads what came of it."""
        if isinstance(news, GivenUp) or news.stop_reason:
            self._close(open_answers, index)
        open_answers.events.put_nowait((index, news))

    def _close(self, open_answers: OpenAnswers, index: int) -> None:
        if index in open_answers.indices:
            open_answers.indices.remove(index)
            self.open_answers -= 1

    def _withdraw(self, queries: list[Query], open_answers: OpenAnswers, indices: list[int], asked: Asked) -> None:
        """Tell the engine that nobody waits for these answers."""
        for index in indices:
            self._close(open_answers, index)
            number, sample = divmod(index, asked.n)
            self.engine.withdraw(queries[number], [asked.first + sample])

    def _state(self, asked: Asked, index: int) -> AnswerState:
        decoding = asked.decoding
        prompt_ids = asked.prompts[index // asked.n]
        stop_ids = decoding.stop_token_ids
        text = GrowingText(
            self.reader.tokenizer, stop_ids, asked.stops, decoding.max_new_tokens, is_shown=asked.is_stream
        )
        empty = Trajectory(prompt_ids, [], [], stop_token_ids=stop_ids, block_size=self.reader.lm.block_size)
        return AnswerState(index, text, empty)

    def _count(self, state: AnswerState, block: NewBlock, seconds: float) -> None:
        if block.token_ids:
            self.metrics.blocks.inc()
            self.metrics.tokens.inc(len(block.token_ids))
            if len(state.trajectory.token_ids) == len(block.token_ids):
                self.metrics.first_block.observe(seconds)
        if state.text.finish_reason:
            self.metrics.answers.labels(state.text.finish_reason).inc()
            self.metrics.seconds.observe(seconds)
            self.mean_seconds += 0.1 * (seconds - self.mean_seconds)

    def _count_dropped(self, open_answers: OpenAnswers, reason: str) -> None:
        if open_answers.indices:
            self.metrics.dropped.labels(reason).inc(len(open_answers.indices))
