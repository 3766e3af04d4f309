"""A block-diffusion model as lm-evaluation-harness asks one: its requests answered, and no answer computed twice."""

import logging
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Self, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM, hash_args
from transformers import PreTrainedTokenizerBase

from dirl_cli.api import load_sampler
from dirl_cli.data.chat import tokenize
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.harness.log_likelihoods import Scoring, TextScorer
from dirl_cli.harness.stop_strings import GenerationOptions, StopStringSampler, read_options
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.training.text_likelihood import Text, windows
from dirl_cli.types import Decoding

LM_EVAL_DEVICE = "cuda:0"  # where its user names none, also on a machine without a GPU
logger = logging.getLogger("lm_eval.models.dirl")  # shown as lm-eval shows its own


class DirlModel(TemplateLM):
    """Answers lm-eval's requests with a sampler.

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
        self.lm: DiffusionLM = sampler.lm
        self.tokenizer: PreTrainedTokenizerBase = self.lm.require_tokenizer()
        self.decoding = self.lm.decoding(decoding)
        self.sampler = sampler
        self.text_sampler = StopStringSampler(sampler, self.decoding)
        self.text_scorer = TextScorer(self.lm, scoring)
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
            "scoring": asdict(self.text_scorer.scoring),
            **self.facts(),
        }

    def facts(self) -> dict[str, Any]:
        """What was measured beside the scores: speeds of what was sampled, the ELBOs' mean standard error in nats."""
        facts: dict[str, Any] = dict(self.text_sampler.tally.speeds())
        if self.text_scorer.standard_error is not None:
            facts["elbo_standard_error"] = self.text_scorer.standard_error
        return facts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, cut at the first of its stop strings."""
        texts: list[str | None] = [None] * len(requests)
        for options, indices in by_options(requests).items():
            numbers = dict(zip(indices, repetitions([requests[i].args[0] for i in indices]), strict=True))
            keys = {i: cache_key("generate_until", requests[i].args, numbers[i]) for i in indices}
            for i in indices:
                texts[i] = self._earlier(keys[i])

            missing = [i for i in indices if texts[i] is None]
            prompts = [self._prompt(requests[i].args[0], options) for i in missing]
            seeds = [self.decoding.seed + 1_000_003 * numbers[i] for i in missing]  # as in any evaluation
            for place, text in self.text_sampler.sample(prompts, seeds, options):
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

    def _prompt(self, context: str, options: GenerationOptions) -> list[int]:
        """The tokens of a context, the last that leave room for an answer; one that is empty is what ends texts."""
        longest = self.lm.longest_prompt
        room = longest - min(self.text_sampler.max_new_tokens(options), longest // 2)
        return last_tokens(self.tok_encode(context) or [self.eot_token_id], room)

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
            total = sum(nats for nats, _ in self.text_scorer.score(pieces, [str(n) for n in range(len(pieces))]))
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

        for i, score in zip(missing, self.text_scorer.score(texts, contexts), strict=True):
            scores[i] = score
            self._keep(keys[i], score)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        self.say_facts()
        return [(score[0], score[1]) for score in scores if score is not None]

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


def by_options(requests: Sequence[Instance]) -> dict[GenerationOptions, list[int]]:
    """The indices of requests with the same options. Raises DirlError for an option that a sampler does not have."""
    groups: dict[GenerationOptions, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(read_options(request.args[1]), []).append(i)
    return groups


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


def last_tokens(token_ids: list[int], count: int) -> list[int]:
    """The last `count` tokens; a warning where that is not all."""
    if len(token_ids) > count:
        logger.warning(
            "a text of %d tokens is cut to its last %d: the model has room for no more", len(token_ids), count
        )
    return token_ids[-count:]
