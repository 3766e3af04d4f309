"""`dirl eval bench=likelihood data=…`: bits per token of given texts, exactly left to right and by the ELBO."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Generator
from transformers import PreTrainedTokenizerBase

from dirl_cli.cli.build import build
from dirl_cli.commands.loaded_model import load_for_answers
from dirl_cli.console import PlainConsole, working
from dirl_cli.data.chat import encode_demonstrations, tokenize
from dirl_cli.data.columns import text_field
from dirl_cli.data.files import TrainingFile, sources_of
from dirl_cli.data.order import generator
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.distributed import Processes, split_by_cost
from dirl_cli.errors import DirlError, Stopped, stop_code
from dirl_cli.evaluation.answers import AnswerLog, drop_torn_line
from dirl_cli.evaluation.likelihood import (
    CAPTION,
    CSV_FILE,
    TEXT_FILE,
    Likelihood,
    TextLikelihood,
    csv_line,
    likelihood_table,
    measure_texts,
    read_texts,
)
from dirl_cli.evaluation.report import csv_text
from dirl_cli.evaluation.result_card import CARD, SOURCE, require_same
from dirl_cli.evaluation.run_record import run_record
from dirl_cli.files import installed, write_json, write_text
from dirl_cli.models.load import DiffusionLM, fingerprint
from dirl_cli.text import counted
from dirl_cli.training.text_likelihood import MaskDraws, Text, evidence_bound, left_to_right, windows
from dirl_cli.types import Instruction

BATCH_ROWS = 4  # rows' worth of texts that are scored, and written, at once


def evaluate_likelihood(cfg: DictConfig, out: Path, bench: Likelihood, console: PlainConsole) -> None:
    """Score the texts of cfg.data: a line for each goes to `out`/texts.jsonl, the rest to eval_card.json."""
    for key in ("predictions", "ids"):
        if cfg[key]:
            raise DirlError(f"{key} is of problems, and bench=likelihood scores texts: leave it out")
    processes = Processes(cfg.gpus * cfg.nodes, cfg.device)
    console.quiet = not processes.is_first
    rows = text_rows(build(cfg.data), bench.column)[: cfg.limit]
    lm = load_for_answers(cfg, processes.device, console)
    texts = encode_texts(lm, rows, bench, build(cfg.instruction, Instruction), console)

    # Resume: texts that an earlier start has scored count, if weights and texts are the same.
    digests = {name: digest_of(text) for name, text in texts.items()}
    source = {"weights": fingerprint(lm.model), "problems": digests}
    if processes.is_first:
        require_same(out / SOURCE, source)
        drop_torn_line(out / TEXT_FILE)
    processes.wait()
    finished = {text.text for text in read_texts(out / TEXT_FILE)} & texts.keys()
    processes.wait()  # nobody appends before all have read
    names = [name for name in texts if name not in finished]
    if finished and names:
        console.print(f"continue after {counted(len(finished), 'text')} in {out / TEXT_FILE}", soft_wrap=True)

    did_work = bool(names)
    share = split_by_cost([len(texts[name].token_ids) for name in names], processes.count)[processes.rank]
    names = [names[i] for i in share]
    try:
        with AnswerLog(out / TEXT_FILE) as log, working(console, "scoring", len(names)) as count:
            done = 0
            for batch in text_batches(names, texts, BATCH_ROWS * bench.row_tokens):
                for scored in score_texts(lm, batch, texts, bench, partial(generator, cfg.seed)):
                    log.append(scored)
                done += len(batch)
                count(done)
    except KeyboardInterrupt as interrupt:
        state = f"{len(read_texts(out / TEXT_FILE))} of {counted(len(texts), 'text')} are in {out / TEXT_FILE}"
        raise Stopped(f"stopped: {state}, and the same command goes on", stop_code(interrupt)) from None

    processes.wait()
    if processes.is_first:
        requested = [text for text in read_texts(out / TEXT_FILE) if text.text in texts]
        conclude_likelihood(cfg, out, lm, source, requested, did_work, console)


def text_rows(data: Any, column: str | None) -> list[Row]:
    """The rows to score: those that data holds out, or all where no source of it holds out any; of a `column`, all."""
    sources, _ = sources_of(data)
    rows: list[Row] = []
    if column is None:
        for source in sources:
            rows += source.validation()
        if not rows:
            for source in sources:
                rows += source.demonstrations()
        return rows

    for source in sources:
        if isinstance(source, TrainingFile):
            expected = f"bench.column={column} is what is scored"
            for row in read_rows(source.path, source.split, source.config):
                rows.append(row._replace(fields={"text": text_field(row, column, expected)}))
        else:
            raise DirlError(f"bench.column={column} is of a file, and data={source.name} is none: leave it out")
    return rows


def encode_texts(
    lm: DiffusionLM, rows: Sequence[Row], bench: Likelihood, instruction: Instruction, console: PlainConsole
) -> dict[str, Text]:
    """The texts by name, as tokens. Raises DirlError where none is left to score.

    Answers that are longer than the model's positions are left out, and counted: half of one is another text.
    """
    tokenizer = lm.require_tokenizer()
    texts: dict[str, Text] = {}
    left_out = 0
    if bench.column:
        encoded = [(ids, [True] * len(ids)) for ids in tokenize(tokenizer, [row.fields["text"] for row in rows])]
    else:
        encoded = encode_demonstrations(tokenizer, rows, instruction)
    for number, (token_ids, scored) in enumerate(encoded):
        text = Text(token_ids, without_first_of_shifted(lm, scored))
        fits = bench.column or len(token_ids) <= lm.max_length
        if fits and any(text.scored) and lm.mask_token_id not in token_ids:
            texts[f"text-{number}"] = text
        else:
            left_out += 1
    if left_out:
        console.print(
            f"{left_out} of {counted(len(rows), 'text')} left out that hold nothing to score, a mask token, or more"
            f" than the model's {lm.max_length} tokens"
        )
    if not texts:
        raise DirlError("no text is left to score: give other data=, with answers or a bench.column=")
    return texts


def without_first_of_shifted(lm: DiffusionLM, scored: Sequence[bool]) -> list[bool]:
    """Which tokens are scored; not the very first one of a model that predicts each from the one before it."""
    return [is_scored and not (lm.logit_shift and position == 0) for position, is_scored in enumerate(scored)]


def digest_of(text: Text) -> str:
    """A digest of a text, which changes with what of it is scored."""
    return hashlib.sha256(json.dumps([list(text.token_ids), list(text.scored)]).encode()).hexdigest()[:16]


def text_batches(names: Sequence[str], texts: Mapping[str, Text], tokens: int) -> list[list[str]]:
    """The names in order, in batches of texts of about so many tokens."""
    result: list[list[str]] = []
    size = tokens
    for name in names:
        if size >= tokens:
            result.append([])
            size = 0
        result[-1].append(name)
        size += len(texts[name].token_ids)
    return result


def score_texts(
    lm: DiffusionLM,
    names: Sequence[str],
    texts: Mapping[str, Text],
    bench: Likelihood,
    seeded: Callable[..., Generator],
) -> list[TextLikelihood]:
    """Both likelihoods of some texts. seeded: a generator from numbers; a text's masks depend on its number alone."""
    parts: list[Text] = []
    generators: list[Generator] = []
    owners = []
    longest = lm.max_length // lm.block_size * lm.block_size
    for name in names:
        for number, window in enumerate(windows(texts[name], longest, lm.block_size)):
            parts.append(window)
            generators.append(seeded(int(name.rpartition("-")[2]), number))
            owners.append(name)
    exact = left_to_right(lm, parts, bench.row_tokens)
    bounds = evidence_bound(lm, parts, MaskDraws(bench.draws, bench.rates), generators, bench.row_tokens)

    scored = []
    for name in names:
        own = [i for i, owner in enumerate(owners) if owner == name]
        text = texts[name]
        scored.append(
            TextLikelihood(
                text=name,
                tokens=sum(text.scored),
                bytes=scored_bytes(lm.require_tokenizer(), text),
                left_to_right=sum(exact[i].total for i in own),
                elbo=added([bounds[i].draws for i in own]),
                rate_logprobs=added([bounds[i].rate_logprobs for i in own]),
                rate_tokens=[int(total) for total in added([bounds[i].rate_tokens for i in own])],
            )
        )
    return scored


def added(lists: Sequence[Sequence[float]]) -> list[float]:
    """The sum of lists of the same length, place by place."""
    return [sum(values) for values in zip(*lists, strict=True)]


def scored_bytes(tokenizer: PreTrainedTokenizerBase, text: Text) -> int:
    """The bytes of what is scored of a text, as UTF-8 and without special tokens."""
    ids = [token for token, is_scored in zip(text.token_ids, text.scored, strict=True) if is_scored]
    return len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode())


def conclude_likelihood(
    cfg: DictConfig,
    out: Path,
    lm: DiffusionLM,
    source: Mapping[str, Any],
    texts: Sequence[TextLikelihood],
    did_work: bool,
    console: PlainConsole,
) -> None:
    """Write the card and the CSV file of an evaluation, and print its table.

    did_work: whether this start had any text left to score.
    """
    metrics = measure_texts(texts)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    card = {
        "model": {**settings["model"], "block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
        "bench": {**settings["bench"], "limit": cfg.limit},
        "data": settings["data"],
        "instruction": settings["instruction"],
        "seed": cfg.seed,
        "dtype": cfg.dtype,
        "attention": cfg.attention,
        "device": str(lm.device),
        "sampled_from": {"weights": source["weights"], "problems": len(source["problems"])},
        "versions": {package: installed(package) for package in ("dirl", "torch", "transformers")},
        "record": run_record(out, cfg.gpus * cfg.nodes, did_work),
        "likelihood": asdict(metrics),
    }
    write_json(out / CARD, card)
    write_text(out / CSV_FILE, csv_text([csv_line(metrics)]))
    title = f"{cfg.model.name} on {counted(metrics.texts, 'text')} of {cfg.data.name}"
    console.print(likelihood_table(title, metrics))
    console.print(CAPTION, soft_wrap=True)
    console.print(f"{out / CARD} · {out / CSV_FILE} · {out / TEXT_FILE}", soft_wrap=True)
