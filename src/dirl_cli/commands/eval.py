"""`dirl eval`: ask a model every problem of a benchmark, grade as answers come, report how good and how fast it is."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from dirl_cli.build import build
from dirl_cli.data.chat import answer_text, encode_problems
from dirl_cli.disk import write_json
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import Answer, AnswerLog, Run, drop_torn_line, missing, read_answers
from dirl_cli.evaluation.grade import graded
from dirl_cli.evaluation.metrics import measure, measure_subsets
from dirl_cli.evaluation.progress import tracked
from dirl_cli.evaluation.report import table
from dirl_cli.models.checkpoint import DiffusionLM, fingerprint
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.types import Decoding, Problem, Trajectory

PACKAGES = ("dirl", "torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy")


def run(cfg: DictConfig, out: Path) -> None:
    """Evaluate cfg.model on cfg.bench: answers go to `out`/answers.jsonl as they come, the rest to eval_card.json."""
    processes = Processes(cfg.gpus, cfg.device)
    console = Console(quiet=not processes.is_first, highlight=False, soft_wrap=True)
    bench = build(cfg.bench)
    problems = bench.problems()[: cfg.limit]
    if not problems or cfg.samples < 1:
        raise DirlError("there is nothing to evaluate: limit and samples must be at least 1")
    lm: DiffusionLM = build(cfg.model).load(cfg.dtype, processes.device, cfg.attention)
    tokenizer = lm.require_tokenizer()
    decoding = build(cfg.decoding, Decoding)
    decoding = replace(decoding, stop_token_ids=decoding.stop_token_ids or lm.stop_token_ids)
    prompts = encode_problems(tokenizer, problems, bench.instruction, lm.longest_prompt)

    file = out / "answers.jsonl"
    source = {"weights": fingerprint(lm.model), "problems": digest(prompts, [p.answer for p in problems])}
    if processes.is_first:
        require_same(out / "sampled_from.json", source)
        drop_torn_line(file)
    processes.wait()
    known = read_answers(file)
    processes.wait()  # nobody appends before all have read
    runs = list(missing([problem.id for problem in problems], cfg.samples, {(a.problem, a.sample) for a in known}))
    if known and runs:
        console.print(f"continue after {len(known)} answers in {file}")
    runs = runs[processes.rank :: processes.count]
    total = len(known) + sum(run.end - run.first for run in runs)
    with Grader(cfg.grade_workers, cfg.grade_timeout) as grader, AnswerLog(file) as log:
        sampled = sample(NativeSampler(lm, cfg.max_batch), prompts, runs, decoding)
        for answer in tracked(graded(sampled, problems, decoder(tokenizer), grader), known, total, console):
            log.append(answer)
        if grader.gave_up:
            console.print(f"{grader.gave_up} answers took too long or too much to compare and count as wrong")

    processes.wait()
    if processes.is_first:
        facts = {
            "model": {**plain(cfg.model), "block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
            "bench": {**plain(cfg.bench), "limit": cfg.limit},
            "samples": cfg.samples,
            "decoding": {**asdict(decoding), "block_size": lm.block_size},
            "dtype": cfg.dtype,
            "device": str(lm.device),
            "grade_timeout": cfg.grade_timeout,
            "sampled_from": source,
            "versions": {package: version(package) for package in PACKAGES},
        }
        report(out, f"{cfg.model.name} on {bench.name}", read_answers(file), problems, facts, console)


def report(
    out: Path, title: str, answers: list[Answer], problems: Sequence[Problem], facts: dict[str, Any], console: Console
) -> None:
    """Draw the table and write the card."""
    overall, subsets = measure(answers), measure_subsets(answers, problems)
    parts = {name: asdict(part) for name, part in subsets.items()}
    write_json(out / "eval_card.json", {**facts, "metrics": asdict(overall), "subsets": parts})
    console.print(table(title, {"all": overall, **subsets}))
    console.print(f"{overall.tokens_per_second:,.0f} tokens/s · {out / 'eval_card.json'} · {out / 'answers.jsonl'}")


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    return partial(answer_text, tokenizer)


def sample(
    sampler: Sampler, prompts: Sequence[list[int]], runs: Sequence[Run], decoding: Decoding
) -> Iterator[tuple[int, int, Trajectory]]:
    """Sample the runs; an answer depends on its prompt and sample index, not on which others are missing.

    Problems with the same prompt get seeds of their own, so that their answers differ.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(decoding.seed + 1_000_003 * seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    by_end: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        by_end[run.end].append(run)
    for end, group in by_end.items():
        wanted = [prompts[run.place] for run in group]
        first = [run.first for run in group]
        for i, number, trajectory in sampler.stream(
            wanted, end, decoding, first, seeds=[seeds[run.place] for run in group]
        ):
            yield group[i].place, number, trajectory


def require_same(path: Path, source: dict[str, str]) -> None:
    """Note what the answers are sampled from. Raises DirlError where those already there came from something else."""
    if not path.exists():
        write_json(path, source)
    elif changed := [name for name, value in json.loads(path.read_text()).items() if source[name] != value]:
        raise DirlError(
            f"{path.parent} holds answers of other {' and '.join(changed)}, changed since under the same name:"
            " give this evaluation a name=…, or set that one aside with resume=never"
        )


def digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def plain(cfg: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


class Processes:
    """The processes of one evaluation: this one's rank and device, and how many there are."""

    def __init__(self, count: int, device: str) -> None:
        self.rank, self.count, self.device = 0, 1, device
        if count > 1:
            from accelerate import PartialState  # takes seconds to import

            on_cpu = device == "cpu" or not torch.cuda.is_available()
            self.state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # the first to finish waits for the last
            self.rank, self.count = self.state.process_index, self.state.num_processes
            self.device = str(self.state.device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            self.state.wait_for_everyone()
