"""Sample completions of a prompt, a conversation or a file of prompts, and watch the blocks fill."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dirl_cli.build import build
from dirl_cli.data.chat import encode_messages, encode_prompt, encode_question
from dirl_cli.data.files import Row, read_rows
from dirl_cli.errors import DirlError
from dirl_cli.models.checkpoint import DiffusionLM
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding, Trajectory

HIDDEN = "░"
PANELS = 6  # answers watched at a time


@dataclass(frozen=True)
class Request:
    """What is asked for: prompt tokens, and what its line of the input said besides."""

    prompt_ids: list[int]
    given: dict[str, Any] = field(default_factory=dict)


def run(cfg: DictConfig, out: Path) -> None:
    """Print the completions, and write them as JSON lines where they come from a file or `out` was given."""
    console = Console()
    lm: DiffusionLM = build(cfg.model).load(cfg.dtype, cfg.device, cfg.attention)
    asked = requests(cfg, lm)
    decoding = build(cfg.decoding, Decoding)
    decoding = replace(decoding, stop_token_ids=decoding.stop_token_ids or lm.stop_token_ids)
    sampler = NativeSampler(lm, cfg.max_batch)
    screen = Screen(console, lm, cfg.pace) if cfg.watch else None
    answers = sampler.stream(
        [request.prompt_ids for request in asked],
        cfg.samples,
        decoding,
        seeds=[request.given.get("seed", decoding.seed) for request in asked],
        watch=screen.show if screen else None,
    )
    file = out / "completions.jsonl"
    written = write(file, answers, asked, lm.tokenizer)
    if cfg.input and not screen:
        total = len(asked) * cfg.samples
        for _ in track(written, "Sampling", total, console=console, transient=True):
            pass
    else:
        with screen.live if screen else nullcontext():
            for line in written:
                if screen:
                    screen.finish(line["index"], line["sample"])
                console.print(f"[dim]{summary(line)}[/dim]")
                console.print(line["text"], markup=False, highlight=False)
    console.print(f"[dim]{len(asked) * cfg.samples} completions in {file}[/dim]")


def requests(cfg: DictConfig, lm: DiffusionLM) -> list[Request]:
    """What the command line or the input file asks for."""
    given = [name for name in ("prompt", "messages", "input") if cfg[name] is not None]
    if len(given) != 1:
        raise DirlError("give one of prompt=TEXT, messages=[…] and input=FILE.jsonl")
    if cfg.prompt is not None:
        return [Request(encode_prompt(lm.require_tokenizer(), cfg.prompt), {"prompt": cfg.prompt})]
    if cfg.messages is not None:
        messages: Any = OmegaConf.to_container(cfg.messages)
        return [Request(encode_messages(lm.require_tokenizer(), messages), {"messages": messages})]
    return [Request(encode_row(lm, row, cfg.instruction), row.fields) for row in read_rows(cfg.input)]


def encode_row(lm: DiffusionLM, row: Row, instruction: str | None) -> list[int]:
    """The prompt of one line: prompt_ids, prompt (text), messages, or question (with the instruction)."""
    fields = row.fields
    if "prompt_ids" in fields:
        ids = fields["prompt_ids"]
        vocabulary = lm.model.config.vocab_size
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
            raise DirlError(f"{row.place}: prompt_ids must be a list of token ids below {vocabulary}")
        return ids
    encoders: dict[str, Callable[[PreTrainedTokenizerBase, Any], list[int]]] = {
        "prompt": encode_prompt,
        "messages": encode_messages,
        "question": lambda tokenizer, text: encode_question(tokenizer, text, instruction),
    }
    for name, encode in encoders.items():
        if name in fields:
            return encode(lm.require_tokenizer(), fields[name])
    raise DirlError(f"{row.place} has no prompt: give question, prompt, messages or prompt_ids")


def write(
    file: Path,
    answers: Iterator[tuple[int, int, Trajectory]],
    asked: list[Request],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[dict[str, Any]]:
    """Write each answer as a JSON line as soon as it is finished; an earlier file is kept beside, numbered."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        taken = sum(1 for _ in file.parent.glob(f"{file.stem}~*{file.suffix}"))
        file.rename(file.with_name(f"{file.stem}~{taken + 1}{file.suffix}"))
    with file.open("w") as lines:
        for index, sample, trajectory in answers:
            line = {
                "index": index,
                "sample": sample,
                **asked[index].given,
                "text": tokenizer.decode(trajectory.completion_ids, skip_special_tokens=True) if tokenizer else None,
                "prompt_ids": trajectory.prompt_ids,
                "token_ids": trajectory.token_ids,
                "reveal_step": trajectory.reveal_step,
                "logprobs": trajectory.logprobs,
                "stop_reason": trajectory.stop_reason,
                "denoise_forwards": trajectory.denoise_forwards,
                "forwards": trajectory.forwards,
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()
            yield line


def summary(line: dict[str, Any]) -> str:
    tokens, forwards = len(line["token_ids"]), line["forwards"]
    return f"{tokens} tokens in {forwards} forwards ({tokens / forwards:.2f} each), ended by {line['stop_reason']}"


class Screen:
    """Blocks filling in the terminal: what a forward revealed is lit, what is hidden is shaded."""

    def __init__(self, console: Console, lm: DiffusionLM, pace: float) -> None:
        self.lm, self.tokenizer, self.pace = lm, lm.require_tokenizer(), pace
        self.live = Live(console=console, refresh_per_second=30)
        self.answers: dict[tuple[int, int], list[int]] = {}
        self.previous: dict[tuple[int, int], list[int]] = {}

    def show(self, prompt: int, sample: int, token_ids: list[int]) -> None:
        """Draw an answer so far; waits `pace` seconds so that the eye can follow."""
        self.previous[prompt, sample] = self.answers.get((prompt, sample), [])
        self.answers[prompt, sample] = token_ids
        watched = list(self.answers)[:PANELS]
        self.live.update(Group(*(Panel(self.picture(key), title=f"{key[0]}.{key[1]}") for key in watched)))
        if (prompt, sample) == watched[-1]:
            time.sleep(self.pace)

    def finish(self, prompt: int, sample: int) -> None:
        self.answers.pop((prompt, sample), None)
        self.live.update(Group())

    def picture(self, key: tuple[int, int]) -> Text:
        before, text = self.previous[key], Text()
        for i, token in enumerate(self.answers[key]):
            if token == self.lm.mask_token_id:
                text.append(HIDDEN * 2, style="dim")
            else:
                is_new = i >= len(before) or before[i] == self.lm.mask_token_id
                text.append(str(self.tokenizer.decode([token])), style="bold green" if is_new else "")
        return text
