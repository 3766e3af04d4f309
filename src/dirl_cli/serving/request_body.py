"""The body of a request, in OpenAI's format with this field's own settings: read and checked.

Whatever a body holds counts or is refused: a setting that changed nothing would be taken for one that did.
"""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from dirl_cli.data.chat import encode_messages, tokenize
from dirl_cli.data.conversation import read_turns
from dirl_cli.diffusion.unmasking import BUILT_IN
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.models.load import DiffusionLM
from dirl_cli.ranges import Count, Natural, limit_of, refusal, require, types_of, without_none
from dirl_cli.rollout.pushed_weights import WeightsId
from dirl_cli.serving.refusals import Refusal
from dirl_cli.types import Decoding

# Fields of `Decoding` that a request may set, by the names that it has for them.
DECODING_FIELDS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{
        name: name
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "strategy",
            "threshold",
            "threshold_by_step",
            "threshold_by_position",
            "lowest_threshold",
            "denoising_steps",
            "confidence",
            "stop_token_ids",
        )
    },
}
COMMON = ("model", "n", "stop", "stream", "stream_options", "logprobs", "first", "weights")
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")  # on an answer

# What OpenAI's API has and blocks have not, with the values that ask for nothing.
NEUTRAL: dict[str, Sequence[Any]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# What a request may hold at most: no number may break the engine, and no text keep others waiting.
MOST_STOPS = 64
LONGEST_STOP = 256  # letters
MOST_STOP_TOKENS = 64  # each block of whatever runs beside it is compared with as many
MOST_PROMPTS = 1024
MOST_STEPS = 4096  # there is a threshold for each
LARGEST = 2**31 - 1
LEAST_TEMPERATURE = 0.01  # above greedy: logits over much less are no numbers any more
LEAST_TOP_P = 1e-6  # of much less, rounding leaves nothing


@dataclass(frozen=True)
class Asked:
    """What a request asks for: `n` answers to each of its prompts, from the sample index `first` on.

    decoding: how they are sampled, a seed of its own included. stops: texts before which an answer ends.
    with_usage: whether a stream ends with the counts of tokens. with_logprobs: whether to fill OpenAI's field of them.
    weights: that are to answer; None for whichever there are. answer_ids: blocks that the one answer asked for has
    already, and goes on from.
    """

    prompts: list[list[int]]
    first: int
    n: int
    decoding: Decoding
    stops: tuple[str, ...]
    is_stream: bool
    with_usage: bool
    with_logprobs: bool
    weights: WeightsId | None
    answer_ids: Sequence[int] = ()


class RequestReader:
    """Reads requests to a model.

    name: of the model. decoding: what counts where a request says nothing. longest_prompt: in tokens. most_answers:
    that are let in at once. strategies: that the engine has.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        name: str,
        decoding: Decoding,
        longest_prompt: int,
        most_answers: int,
        strategies: Collection[str] = tuple(BUILT_IN),
    ) -> None:
        self.lm = lm
        self.tokenizer = lm.require_tokenizer()
        self.name = name
        self.decoding = lm.decoding(decoding)
        self.longest_prompt = longest_prompt
        self.most_answers = most_answers
        self.strategies = strategies
        special_tokens = self.tokenizer.all_special_tokens
        self.special_ids = dict(
            zip(special_tokens, self.tokenizer.convert_tokens_to_ids(special_tokens), strict=True)  # type: ignore[arg-type]  # a list for a list
        )
        self.longest_text = longest_prompt * max(map(len, self.tokenizer.get_vocab()))  # letters, of the longest token

    def completion(self, body: Mapping[str, Any]) -> Asked:
        """Of /v1/completions. Raises Refusal or DirlError for what cannot be answered."""
        body = present(body)
        self._require_known(body, ("prompt", "answer_ids"))
        prompts = self._prompts(body.get("prompt"), self._answers(body))
        value = body.get("logprobs")
        if value is not None and (type(value) is not int or value != 0):
            raise Refusal(
                400, "logprobs is the number of alternatives, and none are kept: give 0 for the tokens' own", "logprobs"
            )
        asked = self._asked(body, prompts, with_logprobs=value is not None)
        return replace(asked, answer_ids=self._answer_ids(body, asked))

    def chat(self, body: Mapping[str, Any]) -> Asked:
        """Of /v1/chat/completions. Raises Refusal or DirlError for what cannot be answered."""
        body = present(body)
        self._require_known(body, ("messages",))
        messages, _ = read_turns("messages", body.get("messages"))
        if not messages:
            raise Refusal(400, "messages must be a list of objects with role and content, at least one", "messages")
        self._require_short("".join(turn["content"] for turn in messages))
        self._require_room(self._answers(body))
        prompt_ids = encode_messages(self.tokenizer, messages)
        return self._asked(body, [prompt_ids], with_logprobs=flag(body, "logprobs"))

    def _asked(self, body: Mapping[str, Any], prompts: list[list[int]], with_logprobs: bool) -> Asked:
        """What both kinds of request have in common."""
        name = body.get("model", self.name)
        if name != self.name:
            hint = did_you_mean(str(name), [self.name])
            raise Refusal(404, f"no model is called {name} here: {hint}", "model")
        for prompt_ids in prompts:
            if not prompt_ids:
                raise Refusal(400, "a prompt holds no token: give at least one")
            if len(prompt_ids) > self.longest_prompt:
                raise Refusal(
                    400,
                    f"a prompt has {len(prompt_ids)} tokens and there is room for {self.longest_prompt}: shorten it",
                )

        stops = self._stops(body)
        options = body.get("stream_options", {})
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise Refusal(400, "stream_options may hold include_usage alone: leave the rest out", "stream_options")
        return Asked(
            prompts=prompts,
            first=checked_value("first", body.get("first", 0), Natural),
            n=self._answers(body),
            decoding=self._decoding(body, stops),
            stops=stops,
            is_stream=flag(body, "stream"),
            with_usage=flag(options, "include_usage"),
            with_logprobs=with_logprobs,
            weights=weights_of(body),
        )

    def _answer_ids(self, body: Mapping[str, Any], asked: Asked) -> Sequence[int]:
        """What there is already of the answer that a request asks for."""
        value = body.get("answer_ids", [])
        if value == []:
            return ()
        is_one = len(asked.prompts) == asked.n == 1
        if not is_one or not self._are_token_ids(value):
            raise Refusal(
                400,
                "answer_ids must be a list of token ids that the one answer to one prompt goes on from: give such",
                "answer_ids",
            )
        length = len(asked.prompts[0]) + len(value)
        is_room = len(value) < asked.decoding.max_new_tokens and length <= self.longest_prompt
        if length % self.lm.block_size or not is_room:
            raise Refusal(
                400,
                f"answer_ids ends at token {length} with its prompt: give whole blocks of {self.lm.block_size}, and"
                " fewer than the answer may have",
                "answer_ids",
            )
        return list(value)

    def _are_token_ids(self, value: Any) -> bool:
        return is_token_ids(value) and all(0 <= token < self.lm.vocab_size for token in value)

    def _answers(self, body: Mapping[str, Any]) -> int:
        """How many answers to each prompt a request asks for."""
        return int(checked_value("n", body.get("n", 1), Count))

    def _require_room(self, answers: int) -> None:
        """Raises Refusal for more answers than are ever let in at once."""
        if answers > self.most_answers:
            raise Refusal(
                400,
                f"{answers} answers are more than the {self.most_answers} that are let in at once: ask for fewer",
            )

    def _require_known(self, body: Mapping[str, Any], question_fields: Sequence[str]) -> None:
        """Raises Refusal for the first field that nothing reads, or that asks for what blocks do not have."""
        known = {*question_fields, *COMMON, *DECODING_FIELDS}
        for key, value in body.items():
            if key in NEUTRAL and value not in NEUTRAL[key]:
                raise Refusal(400, f"{key} is nothing that a block-diffusion engine has: leave it out", key)
            if key not in known and key not in NEUTRAL and key not in WITHOUT_EFFECT:
                raise Refusal(400, f"{key}: no such field; {did_you_mean(key, sorted(known))}", key)
        if "max_tokens" in body and "max_completion_tokens" in body:
            raise Refusal(400, "max_tokens and max_completion_tokens mean the same: give one", "max_tokens")

    def _prompts(self, value: Any, n: int) -> list[list[int]]:
        """One or several prompts, each text, taken as it is, or token ids. n: answers to each."""
        if isinstance(value, str) or is_token_ids(value):
            value = [value]
        if not isinstance(value, list) or not value:
            raise Refusal(400, "prompt must be text or a list of token ids, or a list of such: give one", "prompt")
        if len(value) > MOST_PROMPTS:
            raise Refusal(400, f"{len(value)} prompts are more than {MOST_PROMPTS}: give fewer", "prompt")
        self._require_room(len(value) * n)  # before they are tokenized, which takes its time
        if all(isinstance(prompt, str) for prompt in value):
            for text in value:
                self._require_short(text)
            return tokenize(self.tokenizer, value)
        for prompt_ids in value:
            if not self._are_token_ids(prompt_ids):
                raise Refusal(
                    400, f"prompt must be text, or a list of token ids below {self.lm.vocab_size}: give one", "prompt"
                )
        return value

    def _require_short(self, text: str) -> None:
        """Raises Refusal for a text that is too long however it is tokenized, which would take its time."""
        if len(text) > self.longest_text:
            raise Refusal(
                400,
                f"a prompt has {len(text)} letters, more than the {self.longest_prompt} tokens that there is room for:"
                " shorten it",
            )

    def _stops(self, body: Mapping[str, Any]) -> tuple[str, ...]:
        value = body.get("stop", [])
        stops = [value] if isinstance(value, str) else value
        is_list = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
        if not is_list or len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            raise Refusal(
                400,
                f"stop must be a text or a list of at most {MOST_STOPS}, none empty and none of more than"
                f" {LONGEST_STOP} letters: give such",
                "stop",
            )
        return tuple(stops)

    def _decoding(self, body: Mapping[str, Any], stops: Sequence[str]) -> Decoding:
        """How the answers are sampled; with a seed that was drawn where none is given."""
        types = types_of(Decoding)
        settings: dict[str, Any] = {}
        for key, name in DECODING_FIELDS.items():
            if key in body:
                settings[name] = checked_value(key, body[key], types[name])
        if settings.get("denoising_steps", 0) > MOST_STEPS:
            raise Refusal(400, f"denoising_steps may be {MOST_STEPS} at most: give fewer", "denoising_steps")
        if 0 < settings.get("temperature", 0) < LEAST_TEMPERATURE:
            raise Refusal(
                400,
                f"temperature={settings['temperature']:g}: give 0, which is greedy, or at least {LEAST_TEMPERATURE}",
                "temperature",
            )
        if settings.get("top_p", 1) < LEAST_TOP_P:
            raise Refusal(400, f"top_p={settings['top_p']:g}: give at least {LEAST_TOP_P:f}, or top_k=1", "top_p")
        settings.setdefault("seed", secrets.randbits(32))

        # Any other name would be imported, which is for those who start the server.
        strategy = settings.get("strategy", self.decoding.strategy)
        if strategy not in (*self.strategies, self.decoding.strategy):
            raise Refusal(400, f"strategy={strategy}: {did_you_mean(strategy, self.strategies)}", "strategy")
        stop_token_ids = settings.get("stop_token_ids")
        if stop_token_ids == ():
            raise Refusal(400, "stop_token_ids holds none: leave it out for those of the model", "stop_token_ids")
        if stop_token_ids and (len(stop_token_ids) > MOST_STOP_TOKENS or max(stop_token_ids) >= self.lm.vocab_size):
            raise Refusal(
                400,
                f"stop_token_ids may hold {MOST_STOP_TOKENS} token ids below {self.lm.vocab_size}: leave the rest out",
                "stop_token_ids",
            )
        decoding = self.lm.decoding(replace(self.decoding, **settings))

        # A stop string that is a special token never stands in the text, which holds none.
        special = {self.special_ids[stop] for stop in stops if stop in self.special_ids}
        return replace(decoding, stop_token_ids=tuple(sorted({*decoding.stop_token_ids, *special})))


def present(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that hold something: null is what clients send for nothing."""
    return {key: value for key, value in body.items() if value is not None}


def flag(body: Mapping[str, Any], key: str) -> bool:
    """A field that is true or false, and false where it is left out."""
    value = body.get(key) or False
    if not isinstance(value, bool):
        raise Refusal(400, f"{key}={value}: give true or false", key)
    return value


def checked_value(key: str, value: Any, hint: Any) -> Any:
    """A value of a type as `ranges` has them, which JSON may hold otherwise. Raises Refusal where it is not."""
    inner = without_none(hint)
    if get_origin(inner) is tuple:
        if not isinstance(value, list):
            raise Refusal(400, refusal(key, value, hint), key)
        return tuple(checked_value(f"{key}[{i}]", item, get_args(inner)[0]) for i, item in enumerate(value))

    plain_type = get_args(inner)[0] if limit_of(hint) else inner
    if plain_type is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value) is not plain_type:
        raise Refusal(400, refusal(key, value, hint), key)
    try:
        require(value, hint, key)
    except DirlError as error:
        raise Refusal(400, str(error), key) from error
    if plain_type is int and limit_of(hint).at_most is None and value > LARGEST:
        raise Refusal(400, f"{key}={value}: give at most {LARGEST}", key)
    return value


def weights_of(body: Mapping[str, Any]) -> WeightsId | None:
    """The weights that a request is asked of; None where it does not say."""
    value = body.get("weights")
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"version", "sha256"}:
        raise Refusal(400, "weights must hold version and sha256, as GET /health tells them: give both", "weights")
    version = checked_value("weights.version", value["version"], Natural)
    sha256 = value["sha256"]
    return WeightsId(version, None if sha256 is None else checked_sha256("weights.sha256", sha256))


def checked_sha256(key: str, value: Any) -> str:
    """A SHA-256 in hexadecimal digits. Raises Refusal where it is none."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise Refusal(400, f"{key} must be 64 hexadecimal digits, as sha256sum prints them: give such", key)
    return value


def is_token_ids(value: Any) -> bool:
    """Whether a value is a list of whole numbers, at least one."""
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
