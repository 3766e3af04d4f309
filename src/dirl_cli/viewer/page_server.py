"""Serve a page and the answers that it asks for to a browser on this machine."""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dirl_cli.errors import DirlError
from dirl_cli.viewer.served_answers import ServedAnswers

HOST = "127.0.0.1"
MOST = 1000  # answers that may be asked for at once
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def listener_on(port: int) -> socket.socket:
    """A socket that this machine alone reaches; port 0 takes a free one. Raises DirlError where it cannot be had."""
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise DirlError(
            f"port={port} cannot be listened at ({error}): give another, or port=0 for a free one"
        ) from error


def serve_page(listener: socket.socket, app: Starlette) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def page_app(page: str, answers: ServedAnswers, key: str) -> Starlette:
    """The page at /KEY/ and what it asks for below that; nothing elsewhere.

    Only requests to this machine's own names are answered, so that no page from elsewhere can have its name point here.
    """

    def show(request: Request) -> Response:
        return Response(page, media_type="text/html", headers=HEADERS)

    def facts(request: Request) -> Response:
        piece = request.path_params["piece"]
        if piece >= len(answers.pieces):
            return Response(status_code=404)
        return Response(
            answers.pieces[piece], media_type="application/json", headers={**HEADERS, "Content-Encoding": "gzip"}
        )

    def whole(request: Request) -> Response:
        return answered(lambda: answers.whole(places_of(request)))

    def excerpts(request: Request) -> Response:
        return answered(lambda: answers.excerpts(places_of(request)))

    def search(request: Request) -> Response:
        query = request.query_params
        return answered(lambda: answers.search(query.get("words", ""), int(query.get("first", "0"))))

    routes = {"": show, "facts/{piece:int}": facts, "answers": whole, "excerpts": excerpts, "search": search}
    return Starlette(
        routes=[Route(f"/{key}/{path}", handler) for path, handler in routes.items()],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def places_of(request: Request) -> list[int]:
    """The places that a request names. Raises ValueError for what are no numbers, or too many."""
    places = [int(place) for place in request.query_params.get("places", "").split(",")]
    if len(places) > MOST:
        raise ValueError(f"{len(places)} answers are more than {MOST}")
    return places


def answered(work: Callable[[], Any]) -> Response:
    """What `work` returns as JSON, or what is wrong with the request or the files."""
    try:
        return JSONResponse(work(), headers=HEADERS)
    except (ValueError, IndexError) as error:
        return JSONResponse({"error": str(error)}, 400, HEADERS)
    except DirlError as error:
        return JSONResponse({"error": str(error)}, 410, HEADERS)
