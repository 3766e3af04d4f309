"""Sample completions of a prompt, a conversation or a file of prompts, and watch the blocks fill."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from dirl_cli.cli.build import build
from dirl_cli.commands.block_screen import Screen
from dirl_cli.commands.eval import hash_values, to_dict
from dirl_cli.commands.loaded_model import load_for_answers
from dirl_cli.commands.prompts import Prompt, encode_rows, format_request, requested_rows
from dirl_cli.console import PlainConsole, working
from dirl_cli.data.chat import answer_text
from dirl_cli.errors import Stopped, stop_code
from dirl_cli.evaluation.answers import drop_torn_line
from dirl_cli.files import unused_name, writing
from dirl_cli.models.load import fingerprint
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.engines import require_strategy
from dirl_cli.rollout.storage import trajectory_columns
from dirl_cli.text import counted
from dirl_cli.types import Decoding, Trajectory

SOURCE = "sampled_from.json"
UNTRAINED = (
    "model=tiny has random weights, so what it says is noise: run `dirl sft`, then give"
    " `model=runs/sft/tiny-arithmetic/model`"
)


def run(cfg: DictConfig, out: Path) -> None:
    """Write completions as JSON lines to `out`, and print those of a prompt that is no file's.

    Completions of an input file go on where an earlier start was interrupted.
    """
    console = PlainConsole(soft_wrap=True)
    engine = build(cfg.rollout)
    require_strategy(engine, build(cfg.decoding, Decoding))
    engine.require()
    rows = requested_rows(cfg)
    if not cfg.input:
        console.print(format_request(rows[0].fields), style="dim")
    if isinstance(build(cfg.model), Tiny):
        console.print(UNTRAINED)
    lm = load_for_answers(cfg, cfg.device, console)
    prompts = encode_rows(cfg, lm, rows)
    decoding = lm.decoding(build(cfg.decoding, Decoding))
    sampler = engine.start(lm)
    screen = Screen(console, lm, cfg.pace) if cfg.watch else None

    # Completions of an earlier start count if nothing that they depend on has changed.
    file = out / "completions.jsonl"
    total = len(prompts) * cfg.samples
    seeded_prompts = [(prompt.prompt_ids, prompt.seed) for prompt in prompts]
    source = {
        "model": to_dict(cfg.model),
        "decoding": asdict(decoding),
        "samples": cfg.samples,
        "digest": hash_values(fingerprint(lm.model), seeded_prompts),
    }
    done = resume_or_begin(file, source, total, console, resumes=bool(cfg.input))

    # A sampler goes on from the first that is missing, behind which others may be finished.
    answers = sampler.stream(
        [prompt.prompt_ids for prompt in prompts],
        cfg.samples,
        decoding,
        first=[first_missing(i, cfg.samples, done) for i in range(len(prompts))],
        seeds=[prompt.seed for prompt in prompts],
        watch=screen.show if screen else None,
    )
    missing = (answer for answer in answers if answer[:2] not in done)
    written = write(file, missing, prompts, lm.tokenizer)

    # Those of a file are counted; any other is read by somebody who waits for it.
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
                    tokens = len(line["token_ids"])
                    console.print(format_summary(tokens, line["forwards"], line["stop_reason"]), style="dim")
                    console.print(line["text"])
    except KeyboardInterrupt as interrupt:
        hint = ", and the same command goes on" if cfg.input else ""
        sentence = f"stopped: {finished} of {total} completions are in {file}{hint}"
        raise Stopped(sentence, stop_code(interrupt)) from None
    console.print(f"{counted(total, 'completion')} in {file}", style="dim")


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


def finished_completions(file: Path, source: dict[str, Any]) -> set[tuple[int, int]]:
    """The (prompt index, sample index) of completions that an earlier start wrote, if it sampled from the same."""
    note = file.with_name(SOURCE)
    if not (file.exists() and note.exists() and note.read_text() == source_text(source)):
        return set()
    drop_torn_line(file)
    done = set()
    with file.open() as lines:
        for line in map(json.loads, lines):
            done.add((line["index"], line["sample"]))
    return done


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
            earlier = file.rename(unused_name(file))
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
            text = None  # of prompts that were given as token ids, to a model without a tokenizer
            if tokenizer:
                text = answer_text(tokenizer, trajectory.completion_ids)
            line = {
                **prompts[index].fields,
                "index": index,
                "sample": sample,
                "text": text,
                **trajectory_columns(trajectory),
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()
            yield line


def format_summary(tokens: int, forwards: int, ending: str) -> str:
    """Such as: 32 tokens in 8 forwards (4.00 each), ended by stop."""
    return f"{tokens} tokens in {forwards} forwards ({tokens / forwards:.2f} each), ended by {ending}"
