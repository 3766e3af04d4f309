"""Sample texts that end before a task's stop strings, with the options that lm-eval's tasks give."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl_cli.data.chat import answer_text, first_stop
from dirl_cli.errors import DirlError
from dirl_cli.rollout.sampler import Sampler, collect_samples
from dirl_cli.types import Decoding, Trajectory

FIRST_STRETCH = 64  # tokens that are sampled before stop strings are first looked for
LENGTHS = ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks")  # names of one option
SAMPLING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class GenerationOptions:
    """What a task says of the texts it asks for.

    stop_strings: each ends a text. max_new_tokens: None where the task does not say. sampling: the fields of Decoding
    that it sets, and their values; none for greedy.
    """

    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    sampling: tuple[tuple[str, Any], ...] = ()


def read_options(options: Mapping[str, Any]) -> GenerationOptions:
    """A task's `generation_kwargs`, under each of the names that lm-eval has for one option.

    A task that says `do_sample: false`, or nothing of sampling, leaves this as it is: greedy unless told otherwise.
    Raises DirlError for an option that a sampler does not have.
    """
    rest = dict(options)
    stop_strings = rest.pop("until", None) or []
    if isinstance(stop_strings, str):
        stop_strings = [stop_strings]

    rest.pop("max_length", None)  # of prompt and answer together, which is the model's to say
    max_new_tokens = None
    for name in LENGTHS:
        length = rest.pop(name, None)
        if length is not None:
            max_new_tokens = int(length)

    do_sample = rest.pop("do_sample", None)
    sampling = {name: rest.pop(name) for name in SAMPLING if name in rest}
    if do_sample is False or (do_sample is None and not sampling.get("temperature")):
        sampling = {}
    if rest:
        name = next(iter(rest))
        raise DirlError(f"generation option {name}={rest[name]}: a block is sampled without it, so leave it out")
    return GenerationOptions(tuple(filter(None, stop_strings)), max_new_tokens, tuple(sorted(sampling.items())))


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


class StopStringSampler:
    """Samples texts that end before stop strings, with a sampler that knows of stop tokens alone.

    It samples in stretches, ever longer ones, since only between them stop strings are looked for: what is sampled
    beyond one is less than what stands before it, or FIRST_STRETCH tokens.
    """

    def __init__(self, sampler: Sampler, decoding: Decoding) -> None:
        self.sampler = sampler
        self.decoding = decoding
        self.tokenizer: PreTrainedTokenizerBase = sampler.lm.require_tokenizer()
        self.tally = Tally()

    def max_new_tokens(self, options: GenerationOptions) -> int:
        """The length of the longest text."""
        return options.max_new_tokens or self.decoding.max_new_tokens

    def decoding_with(self, options: GenerationOptions) -> Decoding:
        """The decoding as a task wants it; of its stop strings those that are tokens stop as such."""
        vocabulary = self.tokenizer.get_vocab()
        special = [vocabulary[stop] for stop in options.stop_strings if stop in self.tokenizer.all_special_tokens]
        stop_token_ids = tuple(sorted({*self.decoding.stop_token_ids, *special}))
        return replace(self.decoding, stop_token_ids=stop_token_ids, **dict(options.sampling))

    def sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], options: GenerationOptions
    ) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, text that follows it), as the texts end. seeds: of each prompt's text."""
        max_new_tokens = self.max_new_tokens(options)
        decoding = self.decoding_with(options)
        longest_prompt = self.sampler.lm.longest_prompt
        answers: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
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
                has_stopped = first_stop(answer_text(self.tokenizer, answers[i]), options.stop_strings) is not None
                is_full = len(answers[i]) >= max_new_tokens or len(prompts[i] + answers[i]) > longest_prompt
                if trajectory.stop_reason == "stop" or is_full or has_stopped:
                    ended.append(i)
                    self.tally.answers += 1
                    text = answer_text(self.tokenizer, answers[i][:max_new_tokens])
                    yield i, text[: first_stop(text, options.stop_strings)]
            self.tally.seconds += time.perf_counter() - began
            running = [i for i in running if i not in ended]
