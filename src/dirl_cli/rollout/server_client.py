"""A server as those see it that sample with it: asked over HTTP, given weights, and held to answer in time."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.pushed_weights import WeightsId

T = TypeVar("T")
Health = Mapping[str, Any]  # what a server says at /health
Source = Mapping[str, Any]  # where weights are, as a request to take them says it
KEY_VARIABLE = "DIRL_SERVE_KEY"
CONNECT = 10  # seconds to connect, and to tell how it is
BROKEN_OFF = 424  # the status of weights that others have not passed on whole
REFUSED = (400, 401, 403, 404, 405, 413, 415)  # statuses of requests that would be refused again


class ServerFailed(Exception):  # noqa: N818
    """What a server did not do, and another one may.

    pause: seconds after which it wants to be asked again. is_busy: it has too much to do, and nothing is wrong.
    """

    def __init__(self, reason: str, pause: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause
        self.is_busy = is_busy


class BrokenOff(ServerFailed):
    """Weights that did not come whole, for which others than the server may be at fault, to whom they went too."""


@dataclass(frozen=True)
class Patience:
    """How long servers are waited for, in seconds.

    silence: in which an engine takes no step, though it has something to do; it hangs where the next are as silent.
    push: that new weights may take. outage: in which no server answers, before the run ends.
    """

    silence: float
    push: float
    outage: float


class ServerClient:
    """One server. connections: that are held at once."""

    length_option = "serve.max_length"

    def __init__(self, url: str, key: str | None, lm: DiffusionLM, patience: Patience, connections: int) -> None:
        self.url = url
        self.lm = lm
        self.patience = patience
        self.http = http_client(url, key, connections)

    async def room(self) -> int:
        """The tokens that a prompt and its answer may have.

        Raises ServerFailed where it does not say, and DirlError where it serves another model.
        """
        return self._checked_length((await self._get("/v1/models"))["data"][0])

    async def lacks(self, weights: WeightsId) -> bool:
        """Whether it answers with others. Raises ServerFailed where it cannot answer now."""
        health = await self._get("/health")
        return WeightsId(health["weights_version"], health["weights_sha256"]) != weights

    async def take(self, source: Source, weights: WeightsId, until: float) -> None:
        """Have it answer with these weights from now on. until: when at the latest, by the loop's clock.

        Raises BrokenOff where they did not come whole from those with whom it was to meet, else ServerFailed.
        """
        body = {**source, "version": weights.version, "sha256": weights.sha256}
        try:
            async with asyncio.timeout_at(until):
                response = await self._while(steps_or_rests, self.http.post("/update_weights", json=body))
        except TimeoutError:
            raise ServerFailed(f"took no new weights within {self.patience.push:g} s") from None
        except httpx.HTTPError as error:
            raise ServerFailed(described(error)) from error
        if response.status_code != 200:
            self._require_key(response.status_code)
            kind = BrokenOff if response.status_code == BROKEN_OFF else ServerFailed
            raise kind(f"took no new weights: {sentence_of(response.content)}")

    async def choices(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The choices of a stream's chunks, a block each.

        Raises ServerFailed where it ends too soon, and DirlError for a request that any server would refuse.
        """
        try:
            request = self.http.build_request("POST", "/v1/completions", json={**body, "stream": True})
            response = await self._while(steps, self.http.send(request, stream=True))
            try:
                if response.status_code != 200:
                    self._refuse(response, await self._while(steps, response.aread()))
                lines = response.aiter_lines()
                while (line := await self._while(steps, anext(lines, None))) != "data: [DONE]":
                    if line is None:
                        raise ServerFailed("hung up in the middle of an answer")
                    if line:
                        yield self._choice(line)
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ServerFailed(described(error)) from error

    def _choice(self, line: str) -> dict[str, Any]:
        try:
            chunk = json.loads(line.removeprefix("data: "))
        except ValueError as error:
            raise ServerFailed("sends what is no answer") from error
        if "error" in chunk:
            raise ServerFailed(chunk["error"]["message"])
        choice: dict[str, Any] = chunk["choices"][0]
        return choice

    def _refuse(self, response: httpx.Response, content: bytes) -> None:
        """Raises what comes of a response that is none: DirlError for a request that is wrong."""
        self._require_key(response.status_code)
        if response.status_code in REFUSED:
            raise DirlError(f"{self.url} refuses what it is asked: {sentence_of(content)}")
        pause = response.headers.get("retry-after", "")
        seconds = float(pause) if pause.isdigit() else 0.0
        raise ServerFailed(sentence_of(content), seconds, is_busy=response.status_code == 429)

    def _require_key(self, status: int) -> None:
        if status == 401:
            raise DirlError(f"{self.url} wants its key: give it in {KEY_VARIABLE}, the same for all servers")

    def _checked_length(self, card: dict[str, Any]) -> int:
        """The tokens that it has room for. Raises DirlError where it samples otherwise than the model that is given."""
        for name in ("block_size", "mask_token_id", "logit_shift"):
            if card.get(name) != getattr(self.lm, name):
                raise DirlError(
                    f"{self.url} serves a model whose {name} is {card.get(name)}, and here it is"
                    f" {getattr(self.lm, name)}: serve the same model, by the same version of dirl"
                )
        return int(card["max_model_len"])

    async def _get(self, path: str) -> dict[str, Any]:
        """What it tells of itself. Raises ServerFailed where it cannot answer now."""
        try:
            async with asyncio.timeout(CONNECT):
                response = await self.http.get(path)
            told: dict[str, Any] = response.json()
        except TimeoutError:
            raise ServerFailed(f"does not say how it is within {CONNECT} s") from None
        except (httpx.HTTPError, ValueError) as error:
            raise ServerFailed(described(error)) from error
        self._require_key(response.status_code)
        if response.status_code != 200:
            raise ServerFailed(
                f"says that it is {told['status']}" if "status" in told else sentence_of(response.content)
            )
        return told

    async def _while(self, is_well: Callable[[Health, Health], bool], work: Awaitable[T]) -> T:
        """What comes of the work, as long as the server is well from one look to the next. Raises ServerFailed else."""
        before: Health | None = None

        async def look() -> None:
            nonlocal before
            now = await self._get("/health")
            is_hanging = before is not None and not is_well(before, now)
            before = now
            if is_hanging:
                raise ServerFailed(f"takes no step in {self.patience.silence:g} s")

        return await watched(work, self.patience.silence, look)


def http_client(url: str, key: str | None, connections: int) -> httpx.AsyncClient:
    """What asks one server, over so many connections at once; reading is bounded by `watched`."""
    return httpx.AsyncClient(
        base_url=url,
        headers=[(b"Authorization", f"Bearer {key}".encode())] if key else [],
        timeout=httpx.Timeout(CONNECT, read=None, pool=None),
        limits=httpx.Limits(max_connections=connections),
        trust_env=False,  # a proxy for the world is none for a neighbour
    )


async def watched(work: Awaitable[T], every: float, look: Callable[[], Awaitable[None]]) -> T:
    """What comes of the work, which ends with what `look` raises. every: seconds between looks at who does it."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=every))[0]:
            await look()
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def steps(before: Health, now: Health) -> bool:
    """Whether the engine has taken steps since, be it for others."""
    return bool(now["forwards"] != before["forwards"])


def steps_or_rests(before: Health, now: Health) -> bool:
    """Whether it has, or has no answers under way, as while it reads new weights."""
    return not now["running"] or steps(before, now)


def require_showable(key: str) -> None:
    """Raises DirlError for a key that no request can show. Whoever sends it nevertheless is told it, with the error."""
    if key != key.strip() or any(ord(letter) < 32 or ord(letter) == 127 for letter in key):
        raise DirlError(f"the key in {KEY_VARIABLE} begins or ends in a space, or holds a line break: leave that out")


def described(error: Exception) -> str:
    """What went wrong with a connection, in a few words."""
    return str(error).strip().rstrip(".") or type(error).__name__


def sentence_of(content: bytes) -> str:
    """The sentence of an error in OpenAI's shape; of anything else its beginning."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return content[:200].decode(errors="replace") or "an empty response"
