"""Samples with any number of servers (`dirl serve`, SGLang): each prompt is asked of the one that owes least.

What a server does not answer is asked of another with the same seed, and so has the same answer; server_pool.py says
which may be asked. Every answer is of the weights that its request names, or there is none: see `WeightsId`.

The servers are asked from a thread of its own; `stream` takes from a queue what comes.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from torch import Tensor

from dirl_cli.distributed import first_tells, is_first_of_group, is_group, wait_for_group
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.pooled_server import PooledServer, cancelled
from dirl_cli.rollout.pushed_weights import WeightsId, remove_other_weights, write_weights
from dirl_cli.rollout.sampler import Hint, LiveBatch, Stint, Watch, collect_samples, continued
from dirl_cli.rollout.server_client import Patience, ServerClient, ServerFailed
from dirl_cli.rollout.server_pool import POLL, End, ServerPool, unknown_end
from dirl_cli.rollout.sglang_client import SglangClient
from dirl_cli.rollout.storage import trajectory_from_json
from dirl_cli.rollout.weight_push import DiskPush, WeightPush
from dirl_cli.types import SENT_AS_IT_IS, Decoding, Trajectory

T = TypeVar("T")
MOST_TRIES = 20  # of a prompt, each failed by a server that goes on otherwise
DISK = DiskPush()
LISTS = ("token_ids", "reveal_step", "logprobs")  # of which a chunk has a block's

Answer = tuple[int, int, Trajectory]  # with the indices of its prompt and sample


@dataclass
class Question:
    """The answers to a prompt that are to be asked for together, since what is computed of it is computed once.

    first, n: sample indices from `first` to `first` + `n`. so_far: what there is of the one answer that is asked for.
    answered: those that have come. tries: that have failed. parts: what the present try has brought of each.
    """

    prompt: int
    prompt_ids: list[int]
    first: int
    n: int
    seed: int
    so_far: Trajectory | None = None
    answered: set[int] = field(default_factory=set)
    tries: int = 0
    parts: list[dict[str, Any]] = field(default_factory=list)

    def trajectory(self, index: int) -> Trajectory:
        """An answer, or what there is of it."""
        part = {"stop_reason": "length", **self.parts[index], "prompt_ids": self.prompt_ids}
        return continued(self.so_far, trajectory_from_json(part))

    @property
    def under_way(self) -> dict[tuple[int, int], Trajectory]:
        """What there is of answers that have not ended, by prompt and sample."""
        parts = {}
        for index, part in enumerate(self.parts):
            if part["token_ids"] and index not in self.answered:
                parts[self.prompt, self.first + index] = self.trajectory(index)
        return parts


class ServerSampler:
    """See `Sampler`. It has no weights until `update_weights` brings them to the servers, but then `lm`'s.

    urls: of the servers. directory: in which weights are written. max_batch: answers that are asked of each server at
    once, by each process. key: that servers want to be shown. is_sglang: whether they are SGLang's and not `dirl
    serve`. push, end: see `ServerPool`.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        urls: Sequence[str],
        directory: Path,
        max_batch: int,
        patience: Patience,
        key: str | None,
        is_sglang: bool = False,
        end: End = unknown_end,
        push: WeightPush = DISK,
    ) -> None:
        self.lm = lm
        self.weights_version = 0
        self.directory = directory
        client = SglangClient if is_sglang else ServerClient
        clients = [client(url, key, lm, patience, 2 * max_batch + 4) for url in urls]
        self.pool = ServerPool(clients, max_batch, patience, push, end)

        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, name="servers", daemon=True).start()

    # Of `Sampler`

    def sample(self, prompts: Sequence[list[int]], n: int, decoding: Decoding) -> list[list[Trajectory]]:
        """See `Sampler.sample`."""
        return collect_samples(self.stream(prompts, n, decoding), len(prompts), n)

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        decoding: Decoding,
        first: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        watch: Watch | None = None,
        hints: Sequence[Sequence[Hint]] | None = None,
        stint: Stint | None = None,
    ) -> Iterator[Answer]:
        """See `Sampler.stream`. Raises DirlError for what servers cannot do, and where none answers any more."""
        require_servable(prompts, decoding, self.lm, watch, hints)
        if self.pool.weights is None:
            if is_group():
                raise DirlError(
                    "rollout=server shares the work among its servers, and wants one process: leave out gpus"
                )
            self.update_weights(self.lm.model.named_parameters(), 0)

        stint = stint or Stint(len(prompts))
        questions = []
        for prompt, prompt_ids in enumerate(prompts):
            seed = seeds[prompt] if seeds else decoding.seed
            samples = range(first[prompt] if first else 0, n)
            questions += questions_of(prompt, prompt_ids, samples, seed, stint)

        told: queue.SimpleQueue[Answer | Future[dict[tuple[int, int], Trajectory]]] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._answer_all(questions, decoding, stint, told.put), self.loop)
        work.add_done_callback(told.put)
        try:
            while not isinstance(news := told.get(), Future):
                stint.under_way.pop(news[:2], None)
                yield news
            stint.under_way |= news.result()  # raises what ended it
        finally:
            work.cancel()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Sampler.update_weights`. The first process of a run writes them; every process has to call.

        Servers that cannot take them now are left out until they have. Raises DirlError where that is all of them.
        """
        self._wait_for(self.pool.forget_weights())
        wait_for_group()  # before there are new ones, so that no process brings the old ones to a server that returns
        outcome: tuple[Path, WeightsId] | DirlError | None = None
        if is_first_of_group():
            try:
                outcome = write_weights(self.directory, self.lm.model, named_tensors, version)
                self._wait_for(self.pool.adopt(*outcome))
                remove_other_weights(self.directory, outcome[0])
            except DirlError as error:
                outcome = error
        else:
            for _ in named_tensors:
                pass  # gathering them is every process's work

        outcome = first_tells(outcome)
        if isinstance(outcome, DirlError):
            raise outcome
        if outcome and not is_first_of_group():
            self._wait_for(self.pool.adopt(*outcome))
        self.weights_version = version

    def open_batch(self, length: int) -> LiveBatch:
        """Raises DirlError: servers have batches of their own."""
        raise DirlError("rollout=server asks servers, and is none: give rollout=native or rollout=lmdeploy")

    def set_block_size(self, block_size: int) -> None:
        """See `Sampler.set_block_size`. Raises DirlError for another size than the servers'."""
        if block_size != self.lm.block_size:
            raise DirlError("servers sample in blocks of one size: give rollout=native where they grow")

    def sleep(self) -> None:
        """Nothing: the memory is the servers'."""

    def wake(self) -> None:
        """Nothing likewise."""

    # In the loop's thread

    async def _answer_all(
        self, questions: Sequence[Question], decoding: Decoding, stint: Stint, tell: Callable[[Answer], None]
    ) -> dict[tuple[int, int], Trajectory]:
        """Ask all questions, each of the server that owes least, again where it fails; tell answers as they come.

        Returns what there is of those that the stint does not wait for, once it has all that it does.
        """
        waiting = deque(questions)
        running: set[asyncio.Task[Question | None]] = set()
        remaining = stint.begin(asked_by(questions))
        others = any(question.prompt >= stint.waited_for for question in questions)

        def take(answer: Answer) -> None:
            remaining.take(*answer[:2])
            tell(answer)

        self.pool.heard()
        try:
            while (waiting or running) and not (others and remaining.is_over):
                while waiting and (server := self.pool.least_busy(waiting[0].n)):
                    running.add(self._begin(server, waiting.popleft(), decoding, take))

                self.pool.require_hope()
                if not running:
                    await asyncio.sleep(POLL)
                else:
                    done, _ = await asyncio.wait(running, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                    unanswered = [task.result() for task in done]
                    running -= done
                    waiting.extend(question for question in unanswered if question)
        finally:
            await cancelled(running)
        under_way: dict[tuple[int, int], Trajectory] = {}
        for question in questions:
            under_way |= question.under_way
        return under_way

    def _begin(
        self, server: PooledServer, question: Question, decoding: Decoding, tell: Callable[[Answer], None]
    ) -> "asyncio.Task[Question | None]":
        """Ask a server a question, what it owes thereby counted from now on."""
        tokens = question.n * (len(question.prompt_ids) + decoding.max_new_tokens)
        server.tokens += tokens
        server.answers += question.n

        def settle(_: object) -> None:
            server.tokens -= tokens
            server.answers -= question.n

        task = asyncio.create_task(self._ask(server, question, decoding, tell))
        task.add_done_callback(settle)
        return task

    async def _ask(
        self, server: PooledServer, question: Question, decoding: Decoding, tell: Callable[[Answer], None]
    ) -> Question | None:
        """Have a server answer a question; returns the question where some answers are missing."""
        weights = self.pool.weights
        if weights is None or not server.is_up:  # since another question has just failed there
            return question
        self._require_room(server, question, decoding)
        try:
            await self._tell_answers(server, question, decoding, weights, tell)
            server.failures = 0
        except (LookupError, TypeError, ValueError):
            return self._failed(server, question, ServerFailed("sends what is no answer"))
        except ServerFailed as failure:
            return self._failed(server, question, failure)
        return None

    async def _tell_answers(
        self,
        server: PooledServer,
        question: Question,
        decoding: Decoding,
        weights: WeightsId,
        tell: Callable[[Answer], None],
    ) -> None:
        """Join the blocks that a server sends, and tell each answer once it is whole and was not told before.

        Raises ServerFailed where some are missing at the end, or are of other weights.
        """
        body = body_of(question, decoding, weights, self.lm.block_size)
        question.parts = [{name: [] for name in LISTS} for _ in range(question.n)]
        async with aclosing(server.client.choices(body)) as choices:
            async for choice in choices:
                self.pool.heard()
                index, block = choice["index"], choice["trajectory"]
                if block["weights_version"] != weights.version:
                    raise ServerFailed(f"answers with version {block['weights_version']} of the weights")
                part = question.parts[index]
                for name in LISTS:
                    part[name] += block.pop(name)
                part |= block  # the other fields hold up to its end
                if "stop_reason" in block and index not in question.answered:
                    trajectory = question.trajectory(index)
                    question.answered.add(index)
                    tell((question.prompt, question.first + index, trajectory))

        if len(question.answered) < question.n:
            raise ServerFailed("leaves answers out")

    def _require_room(self, server: PooledServer, question: Question, decoding: Decoding) -> None:
        """Raises DirlError where a server would cut an answer short that may be longer here."""
        longest = min(len(question.prompt_ids) + decoding.max_new_tokens, self.lm.longest_prompt + 1)
        if server.length < longest:
            raise DirlError(
                f"{server.client.url} has room for {server.length} tokens, and a prompt and its answer may have"
                f" {longest}: start it with {server.client.length_option}={longest + self.lm.block_size}"
            )

    def _failed(self, server: PooledServer, question: Question, failure: ServerFailed) -> Question:
        """Leave a server out whose answer failed; returns the question, to be asked again."""
        if failure.is_busy:
            if server.is_up:
                self.pool.pause(server, failure)
            return question
        question.parts = []
        question.tries += 1
        if question.tries == MOST_TRIES:
            raise DirlError(
                f"{server.client.url} {failure}, as servers did {MOST_TRIES} times at the same prompt: see their logs"
            )
        if server.is_up:
            self.pool.leave_out(server, failure)
        return question

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of work in the loop's thread; it is given up where this thread is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()


def questions_of(prompt: int, prompt_ids: list[int], samples: Iterable[int], seed: int, stint: Stint) -> list[Question]:
    """What is to be asked of a prompt: answers that are begun one by one, and the others in runs of their samples."""
    questions: list[Question] = []
    run: Question | None = None  # which the next sample may be added to
    for sample in samples:
        so_far = stint.under_way.get((prompt, sample))
        if so_far is None and (prompt, sample) in stint.finished:
            run = None
        elif so_far is None and run:
            run.n += 1
        else:
            question = Question(prompt, prompt_ids, sample, 1, seed, so_far)
            questions.append(question)
            run = None if so_far else question
    return questions


def asked_by(questions: Iterable[Question]) -> list[tuple[int, int]]:
    """The prompt and sample of every answer that some questions ask for."""
    asked = []
    for question in questions:
        asked += [(question.prompt, question.first + i) for i in range(question.n)]
    return asked


def require_servable(
    prompts: Sequence[list[int]],
    decoding: Decoding,
    lm: DiffusionLM,
    watch: Watch | None,
    hints: Sequence[Sequence[Hint]] | None,
) -> None:
    """Raises DirlError for what servers cannot do: a watched stream, hints, another block size, a prompt too long."""
    if watch or hints:
        raise DirlError("watch=true and hints want rollout=native: servers tell of whole blocks, and hold no tokens")
    if decoding.block_size not in (None, lm.block_size):
        raise DirlError(
            f"decoding.block_size is {decoding.block_size} and the model's is {lm.block_size}: leave it out"
        )
    longest = max(map(len, prompts), default=0)
    if longest > lm.longest_prompt:
        raise DirlError(f"a prompt has {longest} tokens and the model has room for {lm.longest_prompt}: shorten it")


def body_of(question: Question, decoding: Decoding, weights: WeightsId, block_size: int) -> dict[str, Any]:
    """The request that a question is, with all that decides its answers, whatever the server's own defaults are."""
    return {
        "prompt": question.prompt_ids,
        "answer_ids": list(question.so_far.token_ids) if question.so_far else None,  # an array is no JSON
        "first": question.first,
        "n": question.n,
        "max_tokens": decoding.max_new_tokens,
        "weights": {"version": weights.version, "sha256": weights.sha256},
        **{name: getattr(decoding, name) for name in SENT_AS_IT_IS},
        "denoising_steps": decoding.denoising_steps or block_size,
        "stop_token_ids": list(decoding.stop_token_ids) or None,
        "seed": question.seed,
    }
