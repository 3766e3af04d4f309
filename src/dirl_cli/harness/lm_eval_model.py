"""A block-diffusion model as lm-evaluation-harness asks one: texts until a stop string, log-likelihoods of texts."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from statistics import fmean
from typing import Annotated, Any, Self, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM, hash_args
from torch import Generator
from transformers import PreTrainedTokenizerBase

from dirl_cli.api import load_sampler
from dirl_cli.data.chat import answer_text, tokenize
from dirl_cli.data.order import generator
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.models.load import DiffusionLM
from dirl_cli.ranges import Count, OneOf, Seed, require_fields
from dirl_cli.rollout.sampler import Sampler, collect_samples
from dirl_cli.training.text_likelihood import (
    EvidenceBound,
    MaskDraws,
    Text,
    TokenLogprobs,
    evidence_bound,
    left_to_right,
    windows,
)
from dirl_cli.types import Decoding, Trajectory

LIKELIHOODS = ("left_to_right", "elbo")
FIRST_STRETCH = 64  # tokens that are sampled before stop strings are first looked for
BATCH_TOKENS = 8192  # of texts that are scored at once
LM_EVAL_DEVICE = "cuda:0"  # where its user names none, also on a machine without a GPU
logger = logging.getLogger("lm_eval.models.dirl")  # shown as lm-eval shows its own


@dataclass(frozen=True)
class Scoring:
    """How log-likelihoods are computed: exactly left to right, or by the ELBO; see training/text_likelihood.py."""

    likelihood: Annotated[str, OneOf(*LIKELIHOODS)] = "left_to_right"
    draws: Count = 8
    rates: Count = 4
    row_tokens: Count = 2048
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_fields(self, "scoring")


class Tally:
    """What answering took so far. tokens: that were revealed, whole blocks."""

    def __init__(self) -> None:
        self.answers = 0
        self.tokens = 0
        self.denoise_forwards = 0
        self.forwards = 0
        self.seconds = 0.0

    def add(self, trajectory: Trajectory) -> None:
        self.tokens += len(trajectory.token_ids)
        self.denoise_forwards += trajectory.denoise_forwards
        self.forwards += trajectory.forwards

    def speeds(self) -> dict[str, float]:
        """Tokens per denoising forward and per forward, forwards summed over answers; nothing before an answer."""
        if not self.forwards:
            return {}
        return {
            "answers": self.answers,
            "tokens": self.tokens,
            "tokens_per_denoising_forward": self.tokens / self.denoise_forwards,
            "tokens_per_forward": self.tokens / self.forwards,
            "tokens_per_second": self.tokens / self.seconds,
        }


class DirlModel(TemplateLM):
    """Answers lm-eval's requests with a sampler.

    `is_greedy` of a log-likelihood is told of decoding from left to right, whichever `scoring` is asked for. Texts of
    which the same stands before, as the choices of a question, get the same random masks.

    answered: what earlier starts of an evaluation have answered, by `cache_key`, to which each answer is added.
    lm-eval's own cache holds one answer to a request, and a task may ask for several that are drawn.
    """

    def __init__(
        self,
        sampler: Sampler,
        decoding: Decoding,
        scoring: Scoring,
        answered: MutableMapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.answered = answered
        self.sampler = sampler
        self.lm: DiffusionLM = sampler.lm
        self.tokenizer: PreTrainedTokenizerBase = self.lm.require_tokenizer()
        self.decoding = self.lm.decoding(decoding)
        self.scoring = scoring
        self.tally = Tally()
        self.standard_errors: list[float] = []  # of the ELBOs, in nats
        self._device = self.lm.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Self:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """Load what `--model_args` names: `model`, how it is loaded, and fields of Decoding and Scoring.

        additional_config: lm-eval's `--device` and `--batch_size`, of which more than 1 is the sampler's max_batch.
        Raises DirlError for an argument that there is not, or without a model.
        """
        options = {key: value for key, value in (additional_config or {}).items() if value is not None}
        batch_size = str(options.get("batch_size", ""))
        device = str(options.get("device", LM_EVAL_DEVICE))
        settings: dict[str, Any] = {"device": "auto" if device == LM_EVAL_DEVICE else device}
        if batch_size.isdigit() and int(batch_size) > 1:
            settings["max_batch"] = int(batch_size)

        loading = ("model", "device", "dtype", "rollout", "max_batch")
        decoding = {field.name for field in fields(Decoding)}
        scoring = {field.name for field in fields(Scoring)}
        for key in arg_dict:
            if key not in {*loading, *decoding, *scoring}:
                raise DirlError(f"--model_args {key}=…: {did_you_mean(key, [*loading, *decoding, *scoring])}")
        if "model" not in arg_dict:
            raise DirlError("name a model: --model_args model=DIRECTORY, such as model=runs/sft/NAME/model")

        chosen = Decoding(**{key: value for key, value in arg_dict.items() if key in decoding})
        scored = Scoring(**{key: value for key, value in arg_dict.items() if key in scoring})
        settings |= {key: value for key, value in arg_dict.items() if key in loading[1:]}
        return cls(load_sampler(arg_dict["model"], **settings), chosen, scored)

    @property
    def eot_token_id(self) -> int:
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        """Positions for prompt and answer, whole blocks."""
        return self.lm.max_length // self.lm.block_size * self.lm.block_size

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's ids and nothing around them, as everywhere in dirl."""
        return tokenize(self.tokenizer, [string])[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's chat template writes it. Raises DirlError where there is none."""
        if self.tokenizer.chat_template is None:
            raise DirlError("the tokenizer has no chat template: leave --apply_chat_template out")
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes of the model beside its results."""
        return {
            "block_size": self.lm.block_size,
            "decoding": asdict(self.decoding),
            "scoring": asdict(self.scoring),
            **self.facts(),
        }

    def facts(self) -> dict[str, Any]:
        """What was measured beside the scores: speeds of what was sampled, the ELBOs' mean standard error in nats."""
        facts: dict[str, Any] = dict(self.tally.speeds())
        if self.standard_errors:
            facts["elbo_standard_error"] = fmean(self.standard_errors)
        return facts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, cut at the first of its stop strings."""
        texts: list[str | None] = [None] * len(requests)
        for options, indices in by_options([request.args[1] for request in requests]).items():
            numbers = repetitions([requests[i].args[0] for i in indices])
            number_of_request = dict(zip(indices, numbers, strict=True))
            keys = {i: cache_key("generate_until", requests[i].args, number_of_request[i]) for i in indices}
            for i in indices:
                texts[i] = self._earlier(keys[i])

            missing = [i for i in indices if texts[i] is None]
            if not missing:
                continue
            contexts = [requests[i].args[0] for i in missing]
            for place, text in self._until(contexts, [number_of_request[i] for i in missing], *options):
                i = missing[place]
                texts[i] = text
                self._keep(keys[i], text)
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        self.say_facts()
        return cast(list[str], texts)

    def _earlier(self, key: str) -> Any:
        """What an earlier start has answered; None for nothing."""
        return None if self.answered is None else self.answered.get(key)

    def _keep(self, key: str, answer: Any) -> None:
        if self.answered is not None:
            self.answered[key] = answer

    def _until(
        self,
        contexts: Sequence[str],
        numbers: Sequence[int],
        until: tuple[str, ...],
        longest: int | None,
        sampling: tuple[tuple[str, Any], ...],
    ) -> Iterable[tuple[int, str]]:
        """Yield (index, text) of contexts with the same options, as they end. numbers: how often each stood before.

        Answers are sampled in stretches, ever longer ones, since only between them stop strings are looked for: what is
        sampled beyond one is less than what stands before it, or FIRST_STRETCH tokens.
        """
        max_new_tokens = longest or self.decoding.max_new_tokens
        vocabulary = self.tokenizer.get_vocab()
        stop_ids = {vocabulary[stop] for stop in until if stop in self.tokenizer.all_special_tokens}
        decoding = replace(
            self.decoding,
            stop_token_ids=tuple(sorted({*self.decoding.stop_token_ids, *stop_ids})),
            **dict(sampling),
        )
        room = self.lm.longest_prompt - min(max_new_tokens, self.lm.longest_prompt // 2)
        prompts = [last_tokens(self.tok_encode(context) or [self.eot_token_id], room) for context in contexts]
        seeds = [decoding.seed + 1_000_003 * n for n in numbers]  # as in any evaluation
        answers: list[list[int]] = [[] for _ in contexts]
        running = list(range(len(contexts)))
        length = 0  # tokens that every running answer has at least
        while running:
            stretch = min(max(length, FIRST_STRETCH), max_new_tokens - length)
            length += stretch
            began = time.perf_counter()
            so_far = [prompts[i] + answers[i] for i in running]
            own_seeds = [seeds[i] for i in running]
            stream = self.sampler.stream(so_far, 1, replace(decoding, max_new_tokens=stretch), seeds=own_seeds)
            sampled = collect_samples(stream, len(running), 1)
            ended = []
            for i, [trajectory] in zip(running, sampled, strict=True):
                self.tally.add(trajectory)
                answers[i] += trajectory.completion_ids
                text = answer_text(self.tokenizer, answers[i])
                is_full = len(answers[i]) >= max_new_tokens or len(prompts[i] + answers[i]) > self.lm.longest_prompt
                if trajectory.stop_reason == "stop" or is_full or first_stop(text, until) is not None:
                    ended.append(i)
                    self.tally.answers += 1
                    kept = answer_text(self.tokenizer, answers[i][:max_new_tokens])
                    yield i, kept[: first_stop(kept, until)]
            self.tally.seconds += time.perf_counter() - began
            running = [i for i in running if i not in ended]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in nats, behind the token that ends texts.

        What is longer than the model's positions is cut into windows: each token is scored once.
        """
        totals: list[float] = []
        for request in requests:
            key = cache_key("loglikelihood_rolling", request.args)
            earlier = self._earlier(key)
            if earlier is not None:
                totals.append(earlier)
                continue
            token_ids = self.tok_encode(request.args[0])
            text = Text([self.eot_token_id, *token_ids], [False] + [True] * len(token_ids))
            pieces = windows(text, self.max_length, self.lm.block_size)
            total = sum(nats for nats, _ in self._score(pieces, [str(n) for n in range(len(pieces))]))
            totals.append(total)
            self._keep(key, total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self.say_facts()
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each continuation; too long a context loses its start."""
        keys = [cache_key("loglikelihood", arguments) for arguments, _, _ in requests]
        scores: list[tuple[float, bool] | None] = [self._earlier(key) for key in keys]
        missing = [i for i, score in enumerate(scores) if score is None]
        texts = []
        contexts = []
        for (context, _), context_ids, continuation_ids in [requests[i] for i in missing]:
            token_ids = last_tokens([*context_ids, *continuation_ids], self.max_length)
            context_length = max(len(token_ids) - len(continuation_ids), 0)
            texts.append(Text(token_ids, [False] * context_length + [True] * (len(token_ids) - context_length)))
            contexts.append(context)

        for batch in consecutive(texts, BATCH_TOKENS):
            for i, score in zip(missing[batch], self._score(texts[batch], contexts[batch]), strict=True):
                scores[i] = score
                self._keep(keys[i], score)
                self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        self.say_facts()
        return [(score[0], score[1]) for score in scores if score is not None]

    def _score(self, texts: Sequence[Text], contexts: Sequence[str]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each text. contexts: what stands before it, which decides its masks."""
        settings = self.scoring
        exact: list[TokenLogprobs] = left_to_right(self.lm, texts, settings.row_tokens)
        greedy = [all(scores.likeliest) for scores in exact]
        if settings.likelihood == "left_to_right":
            return [(scores.total, is_greedy) for scores, is_greedy in zip(exact, greedy, strict=True)]

        masks = MaskDraws(settings.draws, settings.rates)
        generators: list[Generator] = [generator(settings.seed, number_of(context)) for context in contexts]
        bounds: list[EvidenceBound] = evidence_bound(self.lm, texts, masks, generators, settings.row_tokens)
        self.standard_errors += [bound.standard_error for bound in bounds if bound.standard_error is not None]
        return [(bound.mean, is_greedy) for bound, is_greedy in zip(bounds, greedy, strict=True)]

    def say_facts(self) -> None:
        """Log what was measured beside the scores."""
        facts = self.facts()
        if "tokens_per_forward" in facts:
            logger.info(
                "%d answers, %.2f tokens per forward, %.2f per denoising forward",
                facts["answers"],
                facts["tokens_per_forward"],
                facts["tokens_per_denoising_forward"],
            )
        if "elbo_standard_error" in facts:
            logger.info("log-likelihoods are ELBOs, ± %.3f nats on average", facts["elbo_standard_error"])


Options = tuple[tuple[str, ...], int | None, tuple[tuple[str, Any], ...]]


def by_options(all_options: Sequence[Mapping[str, Any]]) -> dict[Options, list[int]]:
    """The indices of requests with the same options. Raises DirlError for an option that a sampler does not have."""
    groups: dict[Options, list[int]] = {}
    for i, options in enumerate(all_options):
        groups.setdefault(read_options(options), []).append(i)
    return groups


def read_options(options: Mapping[str, Any]) -> Options:
    """Stop strings, the longest answer, and what else of `Decoding` a task sets: its temperature, top_k and top_p.

    The longest answer is None where the task says nothing of it.

    A task that says `do_sample: false`, or nothing of sampling, leaves these as they are: greedy unless told otherwise.
    """
    rest = dict(options)
    until = rest.pop("until", None) or []
    if isinstance(until, str):
        until = [until]
    longest = None
    for name in ("max_length", "max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):
        value = rest.pop(name, None)
        if value is not None and name != "max_length":
            longest = int(value)
    do_sample = rest.pop("do_sample", None)
    known = {name: rest.pop(name) for name in ("temperature", "top_k", "top_p") if name in rest}
    if rest:
        name = next(iter(rest))
        raise DirlError(f"generation option {name}={rest[name]}: a block is sampled without it, so leave it out")
    if do_sample is False or (do_sample is None and not known.get("temperature")):
        known = {}
    return tuple(stop for stop in until if stop), longest, tuple(sorted(known.items()))


def cache_key(kind: str, arguments: Sequence[Any], number: int = 0) -> str:
    """What a request is kept under. number: how often the same was asked before it, as of several answers."""
    return str(hash_args(kind, [*arguments, number]))


def repetitions(contexts: Sequence[str]) -> list[int]:
    """How often each context stood before it: a task that asks for several answers gives the same one again."""
    seen: Counter[str] = Counter()
    numbers = []
    for context in contexts:
        numbers.append(seen[context])
        seen[context] += 1
    return numbers


def first_stop(text: str, until: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in a text; None where none is in it."""
    starts = [text.index(stop) for stop in until if stop in text]
    return min(starts, default=None)


def last_tokens(token_ids: list[int], count: int) -> list[int]:
    """The last `count` tokens; a warning where that is not all."""
    if len(token_ids) > count:
        logger.warning(
            "a text of %d tokens is cut to its last %d: the model has room for no more", len(token_ids), count
        )
    return token_ids[-count:]


def consecutive(texts: Sequence[Text], tokens: int) -> list[slice]:
    """Slices of neighbouring texts, each of about so many tokens."""
    slices = []
    first = 0
    size = 0
    for i, text in enumerate(texts):
        size += len(text.token_ids)
        if size >= tokens or i == len(texts) - 1:
            slices.append(slice(first, i + 1))
            first = i + 1
            size = 0
    return slices


def number_of(text: str) -> int:
    """A number that a text decides, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big")
