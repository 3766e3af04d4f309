"""A server of SGLang as those see it that sample with it: asked in its own format, answering as `dirl serve` does."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import httpx

from dirl_cli.diffusion.sampling import request_key
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.rollout.server_client import (
    KEY_VARIABLE,
    REFUSED,
    Patience,
    ServerFailed,
    Source,
    described,
    http_client,
    watched,
)
from dirl_cli.rollout.sglang_blocks import ALGORITHM, FIELD, custom_params
from dirl_cli.rollout.sglang_plugin import require_version

T = TypeVar("T")
ALIVE = 30  # seconds in which it answers whether its engine still does, for which it gives that 20 s itself


class SglangClient:
    """One server of SGLang with this toolkit's plug-in; see `ServerClient`."""

    length_option = "--context-length"

    def __init__(self, url: str, key: str | None, lm: DiffusionLM, patience: Patience, connections: int) -> None:
        self.url = url
        self.lm = lm
        self.patience = patience
        self.http = http_client(url, key, connections)

    async def room(self) -> int:
        """The tokens that a prompt and its answer may have.

        Raises ServerFailed where it does not say, and DirlError where it is started otherwise than it has to be.
        """
        return self._checked_length(await self._get("/server_info"))

    async def lacks(self, weights: WeightsId) -> bool:
        """Whether it answers with others. Raises ServerFailed where it cannot answer now."""
        return bool((await self._get("/model_info"))["weight_version"] != weights_name(weights))

    async def take(self, source: Source, weights: WeightsId, until: float) -> None:
        """See `ServerClient.take`; they lie in a directory."""
        body = {"model_path": source["path"], "weight_version": weights_name(weights)}
        try:
            async with asyncio.timeout_at(until):
                response = await self.http.post("/update_weights_from_disk", json=body)
        except TimeoutError:
            raise ServerFailed(f"took no new weights within {self.patience.push:g} s") from None
        except httpx.HTTPError as error:
            raise ServerFailed(described(error)) from error
        self._require_key(response.status_code)
        if response.status_code != 200:
            raise ServerFailed(f"took no new weights: {message_of(response.content)}")

    async def choices(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The choices of a stream's chunks, a block each, as `dirl serve` writes them. body: as `dirl serve` reads it.

        Raises ServerFailed where it ends too soon, and DirlError for a request that any server would refuse.
        """
        answers = [AnswerStream(body, self.lm.block_size) for _ in range(body["n"])]
        try:
            request = self.http.build_request("POST", "/generate", json=request_body(body, self.lm))
            response = await self._while_alive(self.http.send(request, stream=True))
            try:
                if response.status_code != 200:
                    self._refuse(response.status_code, message_of(await self._while_alive(response.aread())))
                lines = response.aiter_lines()
                while (line := await self._while_alive(anext(lines, None))) != "data: [DONE]":
                    if line is None:
                        raise ServerFailed("hung up in the middle of an answer")
                    if line:
                        chunk = self._chunk(line)
                        index = chunk.get("index", 0)  # which a request for one answer leaves out
                        for block in answers[index].blocks(chunk["meta_info"]):
                            yield {"index": index, "trajectory": block}
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ServerFailed(described(error)) from error

    def _chunk(self, line: str) -> dict[str, Any]:
        """What a line of a stream holds. Raises what comes of an error that it tells."""
        try:
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
        except ValueError as error:
            raise ServerFailed("sends what is no answer") from error
        if "error" in chunk:
            self._refuse(chunk["error"].get("code", 500), chunk["error"]["message"])
        reason = chunk["meta_info"]["finish_reason"] or {}
        if reason.get("type") == "abort":
            self._refuse(reason.get("status_code") or 500, reason.get("message") or "gives an answer up")
        return chunk

    def _refuse(self, status: int, message: str) -> None:
        """Raises what comes of a response that is none: DirlError for a request that is wrong."""
        self._require_key(status)
        if status in REFUSED:
            raise DirlError(f"{self.url} refuses what it is asked: {message}")
        raise ServerFailed(message, is_busy=status in (429, 503))

    def _require_key(self, status: int) -> None:
        if status in (401, 403):
            raise DirlError(f"{self.url} wants its --api-key: give it in {KEY_VARIABLE}, the same for all servers")

    def _checked_length(self, info: Mapping[str, Any]) -> int:
        """The tokens that it has room for. Raises DirlError for what cannot give trajectories."""
        require_version(info["version"], self.url)
        if info["dllm_algorithm"] != ALGORITHM:
            raise DirlError(
                f"{self.url} runs the algorithm {info['dllm_algorithm']}, which tells of no steps: start it with"
                f" --dllm-algorithm {ALGORITHM}, and dirl installed in its environment"
            )
        return int(info["max_req_input_len"]) + self.lm.block_size  # a block is what it keeps free beside the input

    async def _get(self, path: str) -> dict[str, Any]:
        """What it tells of itself. Raises ServerFailed where it cannot answer now."""
        try:
            async with asyncio.timeout(ALIVE):
                response = await self.http.get(path)
            self._require_key(response.status_code)
            if response.status_code != 200:
                raise ServerFailed(message_of(response.content))
            told: dict[str, Any] = response.json()
        except TimeoutError:
            raise ServerFailed(f"does not say how it is within {ALIVE} s") from None
        except (httpx.HTTPError, ValueError) as error:
            raise ServerFailed(described(error)) from error
        return told

    async def _while_alive(self, work: Awaitable[T]) -> T:
        """What comes of the work, as long as the engine gives a sign of life in time. Raises ServerFailed else."""
        return await watched(work, self.patience.silence, self._require_alive)

    async def _require_alive(self) -> None:
        """Raises ServerFailed where neither an answer under way nor a token of a trial goes on."""
        try:
            async with asyncio.timeout(ALIVE):
                status = (await self.http.get("/health_generate")).status_code
        except TimeoutError:
            status = 503
        except httpx.HTTPError as error:
            raise ServerFailed(described(error)) from error
        if status != 200:
            raise ServerFailed(f"takes no step in {self.patience.silence:g} s")


class AnswerStream:
    """What has come of one answer, of which SGLang sends a list with an entry a token: of all, or of what is new."""

    def __init__(self, body: Mapping[str, Any], block_size: int) -> None:
        self.stop_token_ids = body["stop_token_ids"] or []
        self.block_size = block_size
        self.expected = len(body["prompt"]) + len(body["answer_ids"] or [])  # where the next block begins
        self.first = self.expected
        self.denoise_forwards = 0
        self.forwards = 0

    def blocks(self, meta_info: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The blocks that a chunk adds, and their answer's stop reason with the last one.

        Raises ServerFailed for a gap, and DirlError for an answer that SGLang ends otherwise than it was asked to.
        """
        records = [record for record in meta_info[FIELD] if record]
        new = [record for record in records if self.first + record["start"] >= self.expected]
        version, _, _ = meta_info["weight_version"].partition(":")
        blocks = []
        for record in new:
            tokens = record["token_ids"]
            if self.first + record["start"] != self.expected or (self.expected + len(tokens)) % self.block_size:
                raise ServerFailed("leaves tokens of an answer out")
            self.expected += len(tokens)
            self.denoise_forwards += record["denoise_forwards"]
            self.forwards += record["forwards"]
            blocks.append(
                {
                    **{name: record[name] for name in ("token_ids", "reveal_step", "logprobs")},
                    "denoise_forwards": self.denoise_forwards,
                    "forwards": self.forwards,
                    "weights_version": int(version) if version.isdigit() else -1,  # as somebody else has named it
                    "stop_token_ids": self.stop_token_ids,
                    "block_size": self.block_size,
                }
            )
        if reason := meta_info["finish_reason"]:
            self._require_own_stop(reason)
            blocks[-1]["stop_reason"] = reason["type"]
        return blocks

    def _require_own_stop(self, reason: Mapping[str, Any]) -> None:
        """Raises DirlError where SGLang has ended an answer at one of the model's ends that was not asked for."""
        if reason["type"] == "stop" and reason["matched"] not in self.stop_token_ids:
            raise DirlError(
                f"SGLang ends answers at token {reason['matched']}, which its tokenizer has for an end: add it to"
                " decoding.stop_token_ids"
            )


def request_body(body: Mapping[str, Any], lm: DiffusionLM) -> dict[str, Any]:
    """SGLang's request for what `server_sampler.body_of` asks: one input for all answers, and a key for each."""
    answer_ids = body["answer_ids"] or []
    input_ids = [*body["prompt"], *answer_ids]
    room = lm.longest_prompt + 1 - len(input_ids)
    samples = range(body["first"], body["first"] + body["n"])
    params = []
    for sample in samples:
        key = request_key(body["seed"], body["prompt"], sample)
        params.append(
            {
                "max_new_tokens": min(body["max_tokens"] - len(answer_ids), room),
                "stop_token_ids": body["stop_token_ids"],
                "custom_params": custom_params(body, key, lm.block_size, lm.mask_token_id, lm.unsampled_ids),
            }
        )
    if len(params) == 1:
        return {"input_ids": input_ids, "sampling_params": params[0], "stream": True}
    return {"input_ids": [input_ids] * len(params), "sampling_params": params, "stream": True}


def weights_name(weights: WeightsId) -> str:
    """The weights as SGLang names them, in each response too: the version first."""
    return f"{weights.version}:{weights.sha256}"


def message_of(content: bytes) -> str:
    """The sentence of an error, in one of SGLang's shapes; of anything else its beginning."""
    try:
        told = json.loads(content)
        error = told.get("error", told)
        return str(error if isinstance(error, str) else error["message"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return content[:200].decode(errors="replace") or "an empty response"
