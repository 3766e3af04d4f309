"""What a client gets: OpenAI's formats, whole or in chunks, with the trajectory of each answer."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl_cli.rollout.storage import trajectory_to_json
from dirl_cli.serving.request_body import Asked
from dirl_cli.serving.service import AnswerState


class ResponseWriter:
    """Writes the responses to one request. is_chat: whether it asked /v1/chat/completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str, asked: Asked, is_chat: bool) -> None:
        self.tokenizer = tokenizer
        self.asked = asked
        self.is_chat = is_chat
        prefix, name = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": f"{name}.chunk" if is_chat and asked.is_stream else name,
            "created": int(time.time()),
            "model": model,
            "seed": asked.decoding.seed,
        }
        self.begun: set[int] = set()  # choices of which a chunk was written
        self.offsets: dict[int, int] = {}  # of the next token of each choice, in letters

    def whole(self, states: Sequence[AnswerState]) -> dict[str, Any]:
        """The response that holds all answers, which are over."""
        choices = []
        for state in states:
            text = state.text.text
            content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append(
                {
                    "index": state.index,
                    **content,
                    "logprobs": self._logprobs(state, 0),
                    "finish_reason": state.text.finish_reason,
                    "trajectory": trajectory_to_json(state.trajectory),
                }
            )
        return {**self.head, "choices": choices, "usage": self.usage(states)}

    def chunk(self, state: AnswerState, tokens_before: int) -> dict[str, Any]:
        """What the last block of an answer adds. tokens_before: of the text, that earlier chunks told."""
        content: dict[str, Any] = {"text": state.new}
        if self.is_chat:
            delta = {"content": state.new}
            if state.index not in self.begun:
                delta = {"role": "assistant", **delta}
            content = {"delta": delta}
        self.begun.add(state.index)

        # Lists are the block's, to be joined; the other fields hold up to its end.
        trajectory = trajectory_to_json(state.trajectory)
        block = state.last_block
        if block:
            trajectory |= {"token_ids": block.token_ids, "reveal_step": block.reveal_step, "logprobs": block.logprobs}
        if tokens_before:
            del trajectory["prompt_ids"]
        if not state.is_over:
            del trajectory["stop_reason"]
        choice = {
            "index": state.index,
            **content,
            "logprobs": self._logprobs(state, tokens_before),
            "finish_reason": state.text.finish_reason,
            "trajectory": trajectory,
        }
        return {**self.head, "choices": [choice]}

    def last_chunk(self, states: Sequence[AnswerState]) -> dict[str, Any]:
        """The chunk that counts tokens, after all others."""
        return {**self.head, "choices": [], "usage": self.usage(states)}

    def usage(self, states: Sequence[AnswerState]) -> dict[str, int]:
        """Tokens of the prompts, and of the texts."""
        prompt = sum(len(prompt_ids) for prompt_ids in self.asked.prompts)
        completion = sum(len(state.text.token_ids) for state in states)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, state: AnswerState, first: int) -> dict[str, Any] | None:
        """OpenAI's own field of log-probs, of the text's tokens from `first` on; None where nobody asked for it."""
        if not self.asked.with_logprobs:
            return None
        token_ids = state.text.token_ids[first:]
        logprobs = state.trajectory.logprobs[first : first + len(token_ids)]
        tokens = [str(self.tokenizer.decode([token])) for token in token_ids]
        if self.is_chat:
            content = []
            for token, logprob in zip(tokens, logprobs, strict=True):
                content.append({"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []})
            return {"content": content, "refusal": None}

        # Token by token, so that they are the same in a stream.
        offset = self.offsets.get(state.index, 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self.offsets[state.index] = offset
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}
