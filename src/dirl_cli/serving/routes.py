"""The HTTP server: OpenAI's paths, and those that put the engine to sleep, wake it and change its weights."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dirl_cli.errors import DirlError
from dirl_cli.ranges import Natural
from dirl_cli.serving.received_weights import WeightsReceiver, checked_meeting
from dirl_cli.serving.refusals import KINDS, Refusal
from dirl_cli.serving.request_body import Asked, checked_sha256, checked_value
from dirl_cli.serving.response_body import ResponseWriter
from dirl_cli.serving.service import AnswerState, OpenAnswers, Service
from dirl_cli.serving.stored_weights import WrongWeights, published_shapes, read_weights, require_weights

T = TypeVar("T")
HUNG_UP = 499  # for the log of a proxy: nobody reads it
READ_PATIENCE = 60  # seconds that a client may take for a chunk, or to send its request


class EventStream(StreamingResponse):
    """Server-sent events. A client that does not take what it asked for is hung up on.

    leave: called at the end, also where the client was gone before the first event was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], leave: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.events = events
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            await asyncio.wait_for(send(message), READ_PATIENCE)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            return  # the response stays incomplete, on which the connection is closed
        finally:
            await self.events.aclose()  # at once, so that the engine hears of it


class Routes:
    """The paths of a server. key: what its clients show; None for a server that lets everybody in."""

    def __init__(self, service: Service, key: str | None) -> None:
        self.service = service
        self.engine = service.engine
        self.reader = service.reader
        self.key = key
        self.reading = asyncio.Lock()
        self.receiver = WeightsReceiver(service.reader.lm.model.config)
        self.shapes = published_shapes(service.reader.lm)

    def app(self) -> Starlette:
        """The application, which stops the engine at its end."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            self.engine.stop()
            await self.receiver.close()

        routes = [Route("/health", self.health)]
        for path, endpoint, method in (
            ("/metrics", self.metrics, "GET"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.model, "GET"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat_completions, "POST"),
            ("/sleep", self.sleep, "POST"),
            ("/wake", self.wake, "POST"),
            ("/update_weights", self.update_weights, "POST"),
        ):
            routes.append(Route(path, self._guarded(endpoint), methods=[method]))
        handlers: dict[Any, Any] = {
            Refusal: self._refuse,
            DirlError: self._refuse,
            HTTPException: self._refuse,
            ClientDisconnect: self._hung_up,
            Exception: self._fail,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)

    async def health(self, request: Request) -> Response:
        """200 where requests are answered, else 503, and why."""
        state = self.engine.state  # once, so that a version and its sum are of the same weights
        status = "ok"
        if self.engine.ended.done():
            status = "failed"
        elif self.service.is_stopping:
            status = "stopping"
        elif state.is_asleep:
            status = "asleep"
        body = {
            "status": status,
            "weights_version": state.weights.version,
            "weights_sha256": state.weights.sha256,
            "forwards": state.forwards,  # which tells a slow engine from one that hangs
            "running": state.running,  # and an idle one
        }
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(self.reader.name)]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.reader.name:
            raise Refusal(404, f"no model is called {name} here: GET /v1/models names the one that is", "model")
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "dirl",
            "max_model_len": self.reader.longest_prompt + 1,
            "block_size": self.reader.lm.block_size,
            "mask_token_id": self.reader.lm.mask_token_id,
            "logit_shift": self.reader.lm.logit_shift,
            "weights_version": self.engine.state.weights.version,
        }

    async def completions(self, request: Request) -> Response:
        asked = await self._read(self.reader.completion, request)
        return await self._answer(request, asked, is_chat=False)

    async def chat_completions(self, request: Request) -> Response:
        asked = await self._read(self.reader.chat, request)
        return await self._answer(request, asked, is_chat=True)

    async def _read(self, read: Callable[[dict[str, Any]], Asked], request: Request) -> Asked:
        """What a request asks for, read beside the loop, since tokenizing takes its time; one at a time."""
        body = await self._body(request)
        async with self.reading:
            return await run_in_threadpool(read, body)

    async def _answer(self, request: Request, asked: Asked, is_chat: bool) -> Response:
        writer = ResponseWriter(self.reader.tokenizer, self.reader.name, asked, is_chat)
        if asked.is_stream:
            open_answers = self.service.admit(asked)  # or refused before a stream has begun, with a status of its own
            return EventStream(self._events(asked, open_answers, writer), partial(self.service.leave, open_answers))
        states = await unless_hung_up(request, self._all(asked))
        return JSONResponse(writer.whole(states))

    async def _all(self, asked: Asked) -> list[AnswerState]:
        """All answers of a request, in order, once they are over."""
        states: dict[int, AnswerState] = {}
        async with aclosing(self.service.answers(asked, self.service.admit(asked))) as grown:
            async for state in grown:
                states[state.index] = state
        return [states[index] for index in sorted(states)]

    async def _events(
        self, asked: Asked, open_answers: OpenAnswers, writer: ResponseWriter
    ) -> AsyncGenerator[str, None]:
        """The chunks of a stream, an event each time that an answer has grown."""
        states: dict[int, AnswerState] = {}
        sent_tokens: dict[int, int] = {}  # of each text, how many
        try:
            async with aclosing(self.service.answers(asked, open_answers)) as grown:
                async for state in grown:
                    yield event(writer.chunk(state, sent_tokens.get(state.index, 0)))
                    states[state.index] = state
                    sent_tokens[state.index] = len(state.text.token_ids)
        except Refusal as refusal:
            self.service.metrics.refused.labels(refusal.status).inc()
            yield event(refusal.body())
            return
        if asked.with_usage:
            yield event(writer.last_chunk(list(states.values())))
        yield "data: [DONE]\n\n"

    async def sleep(self, request: Request) -> Response:
        await self._done(self.engine.sleep())
        return JSONResponse({"status": "asleep"})

    async def wake(self, request: Request) -> Response:
        await self._done(self.engine.wake())
        return JSONResponse({"status": "ok", "weights_version": self.engine.state.weights.version})

    async def update_weights(self, request: Request) -> Response:
        """Answer with the weights of a directory from now on; what is under way ends with the old ones."""
        body = await self._body(request)
        unknown = sorted(body.keys() - {"path", "broadcast", "version", "sha256"})
        if unknown:
            raise Refusal(
                400,
                f"{unknown[0]}: no such field; give path or broadcast, version if it is not the next, and sha256",
                unknown[0],
            )
        version = body.get("version")
        if version is not None:
            version = checked_value("version", version, Natural)

        sha256 = body.get("sha256")
        if sha256 is not None:
            sha256 = checked_sha256("sha256", sha256)

        if "broadcast" not in body:
            update = await self._ordered(checked_path(body.get("path")), version, sha256)
        elif sha256 is None or "path" in body:
            raise Refusal(400, "what is sent by broadcast has a sha256 and no path: give the one alone", "broadcast")
        else:
            meeting = checked_meeting(body["broadcast"])
            directory = await unless_hung_up(request, self.receiver.receive(meeting))
            update = await self._ordered_once(directory, version, sha256)
        return JSONResponse({"weights_version": await self._done(update)})

    async def _ordered(self, path: str, version: int | None, sha256: str | None) -> Future[int]:
        """An order to the engine to answer with the weights of a directory.

        What is wrong with its files is told before anybody waits for the engine to be idle.
        """
        await run_in_threadpool(require_weights, path, self.shapes, sha256)
        return self.engine.update_weights(partial(read_weights, path), version, sha256)

    async def _ordered_once(self, directory: Path, version: int | None, sha256: str) -> Future[int]:
        """The same, of a directory that goes once it is read, or is not to be."""
        try:
            update = await self._ordered(str(directory), version, sha256)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        # Whoever asked for it may hang up while the engine reads.
        update.add_done_callback(lambda _: shutil.rmtree(directory, ignore_errors=True))
        return update

    async def _done(self, work: Future[T]) -> T:
        """What comes of work of the engine. Raises Refusal where the server cannot, as for want of memory."""
        try:
            return await asyncio.wrap_future(work)
        except WrongWeights:
            raise
        except DirlError as error:
            raise Refusal(503, str(error)) from error

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request holds. Raises Refusal where there is none, or too much of it."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise Refusal(415, "the body of a request is JSON: send Content-Type: application/json")
        limit = self.service.limits.max_body * 2**20
        content = bytearray()
        try:
            async with asyncio.timeout(READ_PATIENCE):
                async for part in request.stream():
                    content += part
                    if len(content) > limit:
                        raise Refusal(413, f"the request is larger than {limit >> 20} MB: ask for less at once")
        except TimeoutError:
            raise Refusal(400, f"the request did not come within {READ_PATIENCE} s: send it at once") from None
        try:
            body = await run_in_threadpool(read_json, content)
        except (ValueError, RecursionError):
            raise Refusal(400, "the body of the request is no JSON: send an object") from None
        if not isinstance(body, dict):
            raise Refusal(400, "the body of the request is no JSON object: send one")
        return body

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint behind the key; without one, closed to a browser's pages, which anybody may have written."""

        async def guarded(request: Request) -> Response:
            if self.key is None:
                if "origin" in request.headers:
                    raise Refusal(403, "a server without a key answers no web page: start it with serve.key=KEY")
            elif not compare_digest(shown_key(request), f"Bearer {self.key}".encode()):
                raise Refusal(
                    401,
                    "the key is missing or wrong: send Authorization: Bearer KEY, with the one that the server"
                    " printed when it started",
                )
            return await endpoint(request)

        return guarded

    async def _fail(self, request: Request, error: Exception) -> Response:
        """What nobody foresaw: the log has its traceback."""
        return Refusal(500, "the server failed at this request: its log says more").response()

    async def _hung_up(self, request: Request, error: Exception) -> Response:
        return Response(status_code=HUNG_UP)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """An error as OpenAI's clients read it; what a user can fix is a fault of the request."""
        if isinstance(error, HTTPException):
            status = error.status_code if error.status_code in KINDS else 400
            path = request.url.path
            error = Refusal(status, f"{request.method} {path} is nothing that is served here: see docs/serve.md")
        refusal = error if isinstance(error, Refusal) else Refusal(400, str(error))
        self.service.metrics.refused.labels(refusal.status).inc()
        return refusal.response()


def checked_path(path: Any) -> str:
    """The directory that a request names. Raises Refusal where it names none."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise Refusal(400, "path must be a directory with weights, as `dirl sft` leaves it: give one", "path")
    return path


def shown_key(request: Request) -> bytes:
    """What a client shows, byte for byte: Starlette reads headers as Latin-1."""
    return request.headers.get("authorization", "").encode("latin-1")


def read_json(content: bytearray) -> Any:
    """The value that JSON in UTF-8 holds. Raises ValueError where it is none, or holds text that UTF-8 has not."""
    text = content.decode()
    value = json.loads(text)
    if "\\ud" in text.lower():  # half of a letter of two, whose other half may be missing
        json.dumps(value, ensure_ascii=False).encode()
    return value


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What comes of the work, which is cancelled when the client hangs up. Raises ClientDisconnect then."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        listening.cancel()
