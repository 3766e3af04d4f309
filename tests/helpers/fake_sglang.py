"""A server that answers in SGLang's format (0.5.23), its blocks decoded as by SGLang's loop with this plug-in.

A forward is the whole sequence through the model, by `tests.reference`.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn import Config, Server

from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.sglang_blocks import FIELD, denoise, open_blocks, request_of
from dirl_cli.serving.listen import address_of, listener_at
from tests.helpers.served import wait_until
from tests.reference.sampling import last_block_logits

SERVER_INFO = {"version": "0.5.23", "dllm_algorithm": "Dirl", "dllm_fdfo": True, "max_req_input_len": 200}


@dataclass
class FakeSglang:
    """Its state. incremental: whether a chunk holds what is new, as with --incremental-streaming-output.

    spoil: changes what a chunk holds. before_chunk: called before each. requests: bodies that came to /generate.
    """

    lm: DiffusionLM
    key: str | None = None
    incremental: bool = False
    info: dict[str, Any] = field(default_factory=lambda: dict(SERVER_INFO))
    weight_version: str = "default"
    eos: tuple[int, ...] = ()
    is_alive: bool = True
    refusal: tuple[int, str] | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    pushes: list[dict[str, Any]] = field(default_factory=list)
    spoil: Any = lambda chunk: chunk
    before_chunk: Any = lambda: None

    def app(self) -> Starlette:
        routes = [
            Route("/server_info", self.told(lambda: self.info)),
            Route("/model_info", self.told(lambda: {"weight_version": self.weight_version})),
            Route("/health_generate", self.health),
            Route("/update_weights_from_disk", self.update, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def refuses(self, request: Request) -> JSONResponse | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    def told(self, what: Any) -> Any:
        async def endpoint(request: Request) -> Response:
            return self.refuses(request) or JSONResponse(what())

        return endpoint

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.is_alive else 503)

    async def update(self, request: Request) -> Response:
        body = await request.json()
        self.pushes.append(body)
        try:
            weights = load_file(f"{body['model_path']}/model.safetensors")
        except OSError as error:
            return JSONResponse({"success": False, "message": str(error), "num_paused_requests": 0}, 400)
        self.lm.model.load_state_dict(weights, strict=False)
        self.weight_version = body["weight_version"]
        return JSONResponse({"success": True, "message": "Succeeded.", "num_paused_requests": 0})

    async def generate(self, request: Request) -> Response:
        if refused := self.refuses(request):
            return refused
        if self.refusal:
            return JSONResponse({"error": {"message": self.refusal[1]}}, self.refusal[0])
        body = await request.json()
        self.requests.append(body)
        is_batch = isinstance(body["sampling_params"], list)
        inputs = body["input_ids"] if is_batch else [body["input_ids"]]
        params = body["sampling_params"] if is_batch else [body["sampling_params"]]

        def stream() -> Iterator[bytes]:
            for index, (input_ids, sampling) in enumerate(zip(inputs, params, strict=True)):
                for chunk in self.chunks(input_ids, sampling):
                    self.before_chunk()
                    chunk = self.spoil(chunk | ({"index": index} if is_batch else {}))
                    yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    def chunks(self, input_ids: list[int], sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of one answer, a block each."""
        size, mask = self.lm.block_size, self.lm.mask_token_id
        asked = request_of(sampling["custom_params"], size, mask)
        stops = {*(sampling["stop_token_ids"] or []), *self.eos}
        sequence = list(input_ids)
        entries: list[Any] = []
        output: list[int] = []
        sent = 0
        reason = None
        while reason is None:
            start = len(sequence) // size * size
            block = torch.tensor([sequence[start:] + [mask] * (start + size - len(sequence))])
            states = open_blocks(block == mask, [asked])
            while not denoise(
                states, block, last_block_logits(self.lm, sequence[:start] + block[0].tolist()), torch.tensor([start])
            )[0]:
                pass
            record = states[0].record(block[0])
            entries += [record | {"start": len(output)}] + [None] * (len(record["token_ids"]) - 1)
            output += record["token_ids"]
            sequence += record["token_ids"]

            # The part of the output that counts ends with the stop token, and with it what is told.
            length = len(output)
            matched = [token for token in record["token_ids"] if token in stops]
            if matched:
                reason = {"type": "stop", "matched": matched[0]}
                length = length - len(record["token_ids"]) + record["token_ids"].index(matched[0]) + 1
            elif length >= sampling["max_new_tokens"]:
                reason = {"type": "length", "length": sampling["max_new_tokens"]}
            length = min(length, sampling["max_new_tokens"])
            first = sent if self.incremental else 0
            sent = length
            yield {
                "text": "",
                "output_ids": output[first:length],
                "meta_info": {
                    "id": "1",
                    "finish_reason": reason,
                    "weight_version": self.weight_version,
                    FIELD: entries[first:length],
                },
            }


@contextmanager
def serving(fake: FakeSglang) -> Iterator[str]:
    """It at a real port, in a thread: its address."""
    listener = listener_at("127.0.0.1", 0)
    server = Server(Config(fake.app(), log_level="error"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield address_of(listener)
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(30)
        time.sleep(0)
