"""Sample completions of a prompt, a conversation or a file of prompts, and watch the blocks fill."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dirl_cli.cli.build import build
from dirl_cli.commands.eval import hash_values, to_dict
from dirl_cli.console import PlainConsole, working
from dirl_cli.data.chat import answer_text, encode_messages, encode_prompt, encode_question
from dirl_cli.data.columns import text_field
from dirl_cli.data.conversation import read_turns
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.errors import DirlError, Stopped, stop_code
from dirl_cli.evaluation.answers import drop_torn_line
from dirl_cli.files import writing
from dirl_cli.models.load import DiffusionLM, fingerprint
from dirl_cli.models.tiny import Tiny
from dirl_cli.types import Decoding, Instruction, Trajectory

HIDDEN = "░"
SOURCE = "sampled_from.json"
PANELS = 6  # answers watched at a time
UNTRAINED = (
    "model=tiny has random weights, so what it says is noise: run `dirl sft`, then give"
    " `model=runs/sft/tiny-arithmetic/model`"
)


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete, as tokens. fields: its line of the input, which the line of the output repeats."""

    prompt_ids: list[int]
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)


def run(cfg: DictConfig, out: Path) -> None:
    """Write completions as JSON lines to `out`, and print those of a prompt that is no file's.

    Completions of an input file go on where an earlier start was interrupted.
    """
    console = PlainConsole(soft_wrap=True)
    engine = build(cfg.rollout)
    engine.require()
    rows = requested_rows(cfg)
    if not cfg.input:
        console.print(format_request(rows[0].fields), style="dim")
    model = build(cfg.model)
    if isinstance(model, Tiny):
        console.print(UNTRAINED)
    with working(console, "loading the model"):
        lm: DiffusionLM = model.load(cfg.dtype, cfg.device, cfg.attention)
    prompts = encode_rows(cfg, lm, rows)
    decoding = lm.decoding(build(cfg.decoding, Decoding))
    sampler = engine.start(lm)
    screen = Screen(console, lm, cfg.pace) if cfg.watch else None

    file = out / "completions.jsonl"
    total = len(prompts) * cfg.samples
    source = {
        "model": to_dict(cfg.model),
        "decoding": asdict(decoding),
        "samples": cfg.samples,
        "digest": hash_values(fingerprint(lm.model), [(prompt.prompt_ids, prompt.seed) for prompt in prompts]),
    }
    done = resume_or_begin(file, source, total, console, resumes=bool(cfg.input))

    answers = sampler.stream(
        [prompt.prompt_ids for prompt in prompts],
        cfg.samples,
        decoding,
        first=[first_missing(i, cfg.samples, done) for i in range(len(prompts))],
        seeds=[prompt.seed for prompt in prompts],
        watch=screen.show if screen else None,
    )
    # A sampler goes on from the first that is missing, behind which others may be finished.
    missing = ((i, sample, trajectory) for i, sample, trajectory in answers if (i, sample) not in done)
    written = write(file, missing, prompts, lm.tokenizer)

    finished = len(done)
    try:
        if cfg.input and not screen:
            with working(console, "sampling", total) as count:
                for _ in written:
                    finished += 1
                    count(finished)
        else:
            with screen.live if screen else working(console, "sampling"):
                for line in written:
                    finished += 1
                    if screen:
                        screen.finish(line["index"], line["sample"])
                    console.print(format_summary(line), style="dim")
                    console.print(line["text"])
    except KeyboardInterrupt as interrupt:
        hint = ", and the same command goes on" if cfg.input else ""
        sentence = f"stopped: {finished} of {total} completions are in {file}{hint}"
        raise Stopped(sentence, stop_code(interrupt)) from None
    console.print(f"{total} completions in {file}", style="dim")


def resume_or_begin(
    file: Path, source: dict[str, Any], total: int, console: PlainConsole, resumes: bool
) -> set[tuple[int, int]]:
    """The (prompt index, sample index) of completions that `file` holds already; without any, the file begins anew.

    source: what is sampled from. total: completions in all. resumes: whether completions of an earlier start count.
    """
    done = finished_completions(file, source) if resumes else set()
    if done:
        console.print(f"{len(done)} of {total} completions are in {file}")
        return done
    earlier = begin(file, source)
    if earlier:
        console.print(f"the earlier completions are in {earlier}", style="dim")
    return done


def requested_rows(cfg: DictConfig) -> list[Row]:
    """The rows to complete: of the input file, or one from the command line or standard input.

    Raises DirlError where several are named, or none while somebody sits at a terminal.
    """
    named = [name for name in ("prompt", "messages", "input") if cfg[name] is not None]
    if len(named) > 1 or (not named and sys.stdin.isatty()):
        raise DirlError("give one of prompt=TEXT, messages=FILE and input=FILE.jsonl, or a prompt on standard input")
    if cfg.input is not None:
        return read_rows(cfg.input)
    if cfg.messages is not None:
        return [Row("the command line", {"messages": conversation(cfg.messages)})]
    prompt = cfg.prompt if named else "-"
    if prompt == "-":
        prompt = read_stdin("a prompt")
    return [Row("the command line", {"prompt": prompt})]


def conversation(messages: Any) -> Any:
    """The turns of a `messages` setting: a list, the text of one (JSON, or YAML in a line), a file of one, or - .

    Raises DirlError for what cannot be read as one.
    """
    if isinstance(messages, ListConfig):
        return OmegaConf.to_container(messages, resolve=True)
    is_text = messages.lstrip().startswith("[")
    if is_text:
        source = "messages"
        content = messages
    elif messages == "-":
        source = "standard input"
        content = read_stdin("messages, a JSON list")
    else:
        source = messages
        content = read_text(Path(messages))

    try:
        return json.loads(content)
    except ValueError as error:
        if not is_text:
            raise DirlError(
                f"{source} is not valid JSON ({error}): give a list of objects with role and content"
            ) from error

    # What is typed by hand may be YAML.
    try:
        return yaml.load(content, yaml.BaseLoader)  # which takes every value for text
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DirlError(
            f"messages is not a list that can be read ({reason}): give a JSON list, or messages=FILE"
        ) from error


def read_text(file: Path) -> str:
    """The text of a file of messages. Raises DirlError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DirlError(f"messages={file} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise DirlError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from error


def read_stdin(what: str) -> str:
    """All of standard input, without the line break at its end.

    what: is to come, said to somebody who types it. Raises DirlError where nothing comes.
    """
    if sys.stdin.isatty():
        print(f"type {what}, and Ctrl-D on a line of its own at the end", file=sys.stderr)
    try:
        content = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DirlError(f"standard input is not UTF-8 text (byte {error.start}): convert it first") from error
    if not content.strip():
        raise DirlError("nothing came on standard input: give prompt=TEXT, messages=FILE or input=FILE.jsonl")
    return content


def format_request(fields: dict[str, Any]) -> str:
    """A row of the command line as text, to show how it was understood."""
    if "messages" not in fields:
        return f"prompt: {fields['prompt']}"
    turns, _ = read_turns("the command line", fields["messages"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def encode_rows(cfg: DictConfig, lm: DiffusionLM, rows: list[Row]) -> list[Prompt]:
    """The prompts of the rows. Raises DirlError that names a row whose prompt is missing, malformed or too long."""
    instruction = build(cfg.instruction, Instruction)
    prompts = []
    for row in rows:
        seed = row.fields.get("seed", cfg.decoding.seed)
        if type(seed) is not int:
            raise DirlError(f"{row.location}: seed must be a whole number, not {seed}")
        prompt_ids = encode_row(lm, row, instruction)
        if len(prompt_ids) > lm.longest_prompt:
            lengths = f"{len(prompt_ids)} tokens and the model has room for {lm.longest_prompt}"
            raise DirlError(f"the prompt of {row.location} has {lengths}: shorten it or leave it out")
        prompts.append(Prompt(prompt_ids, seed, row.fields))
    return prompts


def encode_row(lm: DiffusionLM, row: Row, instruction: Instruction) -> list[int]:
    """The prompt tokens of a row: of its prompt_ids, prompt (text), messages, or question (with the instruction)."""
    fields = row.fields
    if "prompt_ids" in fields:
        ids = fields["prompt_ids"]
        vocabulary = lm.model.config.vocab_size
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
            raise DirlError(f"{row.location}: prompt_ids must be a list of token ids below {vocabulary}")
        return ids
    tokenizer = lm.require_tokenizer()
    if "prompt" in fields:
        return encode_prompt(tokenizer, text_field(row, "prompt", ""))
    if "messages" in fields:
        return encode_messages(tokenizer, messages_of(row))
    if "question" in fields:
        return encode_question(tokenizer, text_field(row, "question", ""), instruction)
    raise DirlError(f"{row.location} has no prompt: give question, prompt, messages or prompt_ids")


def messages_of(row: Row) -> list[dict[str, str]]:
    """The turns of a row's messages. Raises DirlError where there is none."""
    messages, _ = read_turns(row.location, row.fields["messages"])
    if not messages:
        raise DirlError(f"{row.location}: messages must be a list of objects with role and content, at least one")
    return messages


def finished_completions(file: Path, source: dict[str, Any]) -> set[tuple[int, int]]:
    """The (prompt index, sample index) of completions that an earlier start wrote, if it sampled from the same."""
    note = file.with_name(SOURCE)
    if not (file.exists() and note.exists() and note.read_text() == source_text(source)):
        return set()
    drop_torn_line(file)
    with file.open() as lines:
        return {(line["index"], line["sample"]) for line in map(json.loads, lines)}


def first_missing(index: int, samples: int, done: set[tuple[int, int]]) -> int:
    """The first sample of a prompt that is not done yet; `samples` where all are."""
    for sample in range(samples):
        if (index, sample) not in done:
            return sample
    return samples


def source_text(source: dict[str, Any]) -> str:
    """The file that notes what completions were sampled from."""
    return json.dumps(source, indent=2) + "\n"


def begin(file: Path, source: dict[str, Any]) -> Path | None:
    """Note what is sampled from. Returns the new path of an earlier file, which becomes completions~1.jsonl or so."""
    earlier = None
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.stat().st_size:
            n = 1
            while file.with_name(f"{file.stem}~{n}{file.suffix}").exists():
                n += 1
            earlier = file.rename(file.with_name(f"{file.stem}~{n}{file.suffix}"))
        file.with_name(SOURCE).write_text(source_text(source))
    return earlier


def write(
    file: Path,
    answers: Iterator[tuple[int, int, Trajectory]],
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[dict[str, Any]]:
    """Append each answer as a JSON line as soon as it is finished, and yield the line.

    answers: prompt index, sample index and trajectory of each.
    """
    with writing(file), file.open("a", encoding="utf-8") as lines:
        for index, sample, trajectory in answers:
            line = {
                **prompts[index].fields,
                "index": index,
                "sample": sample,
                "text": answer_text(tokenizer, trajectory.completion_ids) if tokenizer else None,
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


def format_summary(line: dict[str, Any]) -> str:
    """Such as: 32 tokens in 8 forwards (4.00 each), ended by stop."""
    tokens = len(line["token_ids"])
    forwards = line["forwards"]
    return f"{tokens} tokens in {forwards} forwards ({tokens / forwards:.2f} each), ended by {line['stop_reason']}"


class Screen:
    """Blocks filling in the terminal: what a forward revealed is lit, what is hidden is shaded."""

    def __init__(self, console: PlainConsole, lm: DiffusionLM, pace: float) -> None:
        self.lm = lm
        self.tokenizer = lm.require_tokenizer()
        self.pace = pace  # seconds
        self.live = Live(console=console, refresh_per_second=30)
        self.answers: dict[tuple[int, int], list[int]] = {}  # token ids by (prompt, sample), as of the last forward
        self.previous: dict[tuple[int, int], list[int]] = {}  # and as of the one before

    def show(self, prompt: int, sample: int, token_ids: list[int]) -> None:
        """Draw an answer so far; waits `pace` seconds so that the eye can follow."""
        self.previous[prompt, sample] = self.answers.get((prompt, sample), [])
        self.answers[prompt, sample] = token_ids
        watched = list(self.answers)[:PANELS]
        pictures = (Panel(self.picture(key), title=f"{key[0]}.{key[1]}") for key in watched)
        self.live.update(Group(*pictures), refresh=True)
        if (prompt, sample) == watched[-1]:
            time.sleep(self.pace)

    def finish(self, prompt: int, sample: int) -> None:
        """Take a finished answer off the screen."""
        self.answers.pop((prompt, sample), None)
        self.live.update(Group())

    def picture(self, key: tuple[int, int]) -> Text:
        """An answer's tokens: masked ones shaded, those of the last forward lit."""
        before = self.previous[key]
        text = Text()
        for i, token in enumerate(self.answers[key]):
            if token == self.lm.mask_token_id:
                text.append(HIDDEN * 2, style="dim")
            else:
                is_new = i >= len(before) or before[i] == self.lm.mask_token_id
                text.append(str(self.tokenizer.decode([token])), style="bold green" if is_new else "")
        return text
