"""`dirl eval`: ask a model every problem of a benchmark, grade as answers come, report how good and how fast it is.

`predictions=FILE` grades answers that exist, `compare=[A,B]` tells two evaluations apart: neither imports torch.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.commands.eval_comparison import after_sweep as after_sweep  # with which a sweep ends
from dirl_cli.commands.eval_comparison import show_comparison
from dirl_cli.commands.loaded_model import load_for_answers
from dirl_cli.console import PlainConsole
from dirl_cli.data.rows import read_rows
from dirl_cli.errors import DirlError, NotDownloaded, Stopped, stop_code
from dirl_cli.evaluation import compare, report
from dirl_cli.evaluation.answers import AnswerLog, GradedAnswer, drop_torn_line, missing, read_answers
from dirl_cli.evaluation.likelihood import Likelihood
from dirl_cli.evaluation.metrics import Metrics, measure, measure_subsets
from dirl_cli.evaluation.predictions import read_predictions, regraded
from dirl_cli.evaluation.result_card import ANSWERS, CARD, SOURCE, require_same
from dirl_cli.evaluation.run import graded, tracked
from dirl_cli.evaluation.run_record import run_record
from dirl_cli.evaluation.scorer_code import digests_by_scorer, regrade_changed
from dirl_cli.files import write_json, write_text
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.verifiers import has_votes
from dirl_cli.text import counted
from dirl_cli.types import Decoding, Instruction, Problem

if TYPE_CHECKING:
    from dirl_cli.models.load import DiffusionLM

GRADERS = ("dirl", "math-verify", "latex2sympy2_extended", "sympy")
PROBE = Problem("probe", "How many legs have two cats?", "8")  # shows how questions are put
console = PlainConsole()


def run(cfg: DictConfig, out: Path) -> None:
    """Compare two evaluations, grade a file of answers, or ask cfg.model; all but the first leave a card in `out`."""
    if cfg.compare:
        show_comparison(cfg.compare)
    elif cfg.harness:
        from dirl_cli.commands.eval_harness import evaluate_harness

        evaluate_harness(cfg, out, console)
    elif isinstance(bench := build(cfg.bench), Likelihood):
        from dirl_cli.commands.eval_likelihood import evaluate_likelihood

        if cfg.dry_run:
            raise DirlError("dry_run tells what sampling takes, and bench=likelihood samples nothing: leave it out")
        evaluate_likelihood(cfg, out, bench, console)
    elif cfg.dry_run:
        plan(cfg, out)
    elif cfg.predictions:
        if is_first():  # the grader has processes of its own
            grade_predictions(cfg, out, *chosen_problems(cfg))
    else:
        evaluate_model(cfg, out, *chosen_problems(cfg))


def plan(cfg: DictConfig, out: Path) -> None:
    """Show what evaluating cfg.model on cfg.bench would take. Raises DirlError where nobody knows how many problems."""
    from dirl_cli.commands.eval_plan import plan_evaluation

    if cfg.predictions:
        raise DirlError("dry_run tells what sampling takes, and predictions are answers already: leave one out")
    try:
        problems, remarks = chosen_problems(cfg)
    except NotDownloaded as error:
        if not cfg.limit:
            raise DirlError(f"{error}, or give limit=N to plan for so many problems") from error
        plan_evaluation(cfg, out, [], cfg.limit, console)
        return
    problems = gradable(cfg.bench.name, problems, remarks)
    plan_evaluation(cfg, out, problems, len(problems), console)


def evaluate_model(cfg: DictConfig, out: Path, problems: Sequence[Problem], remarks: Sequence[str]) -> None:
    """Evaluate cfg.model on cfg.bench: answers go to `out`/answers.jsonl as they come, the rest to eval_card.json."""
    from dirl_cli.data.chat import answer_text, encode_problems
    from dirl_cli.distributed import Processes, split_by_cost
    from dirl_cli.evaluation.questions import sample
    from dirl_cli.models.load import fingerprint
    from dirl_cli.rollout.engines import require_strategy

    # Parts: all of them are checked before the model takes its time to load.
    processes = Processes(cfg.gpus * cfg.nodes, cfg.device)
    console.quiet = not processes.is_first
    problems = gradable(cfg.bench.name, problems, remarks)
    engine = build(cfg.rollout)
    require_strategy(engine, build(cfg.decoding, Decoding))
    engine.require()
    lm = load_for_answers(cfg, processes.device, console)
    tokenizer = lm.require_tokenizer()
    decoding = lm.decoding(build(cfg.decoding, Decoding))
    instruction = build(cfg.instruction, Instruction)
    prompts = encode_problems(tokenizer, problems, instruction, lm.longest_prompt)

    # Resume: answers that an earlier start left count, if they came from the same weights, prompts and problems.
    probe = encode_problems(tokenizer, [PROBE], instruction, lm.longest_prompt)
    source = {"weights": fingerprint(lm.model), "prompts": hash_values(probe), "problems": digests(problems)}
    regraded_count = 0
    if processes.is_first:
        require_same(out / SOURCE, source)
        drop_torn_line(out / ANSWERS)
        with Grader(cfg.grade_workers, cfg.grade_timeout) as grader:
            regraded_count = regrade_changed(out, problems, grader)
    if regraded_count:
        line = f"{counted(regraded_count, 'answer')} graded anew, since a scorer's code is not known to be the same"
        console.print(line, soft_wrap=True)
    processes.wait()
    earlier = requested_answers(read_answers(out / ANSWERS), problems, cfg.samples)
    processes.wait()  # nobody appends before all have read
    finished = {(answer.problem, answer.sample) for answer in earlier}
    problem_ids = [problem.id for problem in problems]
    runs = list(missing(problem_ids, cfg.samples, finished))
    if earlier and runs:
        console.print(f"continue after {len(earlier)} answers in {out / ANSWERS}", soft_wrap=True)

    # Sample and grade this process's share, split by prompt tokens.
    did_work = bool(runs) or regraded_count > 0
    costs = [len(prompts[run.problem_index]) * (run.end - run.first) for run in runs]
    share = split_by_cost(costs, processes.count)[processes.rank]
    runs = [runs[i] for i in share]
    total = len(earlier) + sum(run.end - run.first for run in runs)
    try:
        with Grader(cfg.grade_workers, cfg.grade_timeout) as grader, AnswerLog(out / ANSWERS) as log:
            sampled = sample(engine.start(lm), prompts, runs, decoding)
            answers = graded(sampled, problems, partial(answer_text, tokenizer), grader)
            for answer in tracked(answers, earlier, total, console, processes.count):
                log.append(answer)
            print_ungraded(grader)
    except KeyboardInterrupt as interrupt:
        count = len(requested_answers(read_answers(out / ANSWERS), problems, cfg.samples))
        state = f"{count} of {len(problems) * cfg.samples} answers are in {out / ANSWERS}"
        raise Stopped(f"stopped: {state}, and the same command goes on", stop_code(interrupt)) from None

    # The first process reports, from the file that all have appended to.
    processes.wait()
    if processes.is_first:
        facts = sampling_facts(cfg, lm, decoding, instruction)
        facts["prompt_example"] = {"question": PROBE.question, "prompt": tokenizer.decode(probe[0])}
        facts["sampled_from"] = {**source, "problems": hash_values(source["problems"])}
        facts["versions"] = versions("torch", "transformers")
        all_answers = requested_answers(read_answers(out / ANSWERS), problems, cfg.samples)
        metrics = conclude(cfg, out, cfg.model.name, all_answers, problems, facts, did_work)
        speed = f"{metrics.tokens_per_second or 0:,.0f} tokens/s"
        console.print(f"{speed} · {out / CARD} · {out / ANSWERS}", soft_wrap=True)


def sampling_facts(cfg: DictConfig, lm: "DiffusionLM", decoding: Decoding, instruction: Instruction) -> dict[str, Any]:
    """What the card says of how a model was asked."""
    return {
        "model": {**to_dict(cfg.model), "block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
        "samples": cfg.samples,
        "decoding": {**asdict(decoding), "block_size": lm.block_size},
        "instruction": asdict(instruction),
        "dtype": cfg.dtype,
        "attention": cfg.attention,
        "device": str(lm.device),
        "rollout": to_dict(cfg.rollout),
    }


def grade_predictions(cfg: DictConfig, out: Path, problems: Sequence[Problem], remarks: Sequence[str]) -> None:
    """Grade the answers in cfg.predictions: verdicts go to `out`/graded.jsonl in the file's order."""
    # A line's index counts all problems of the benchmark, also those that cannot be graded.
    index = {problem.id: i for i, problem in enumerate(problems)}
    rows = ((row.location, row.fields) for row in read_rows(cfg.predictions))
    answers = read_predictions(rows, problems)
    problems = gradable(cfg.bench.name, problems, remarks)
    gradable_ids = {problem.id for problem in problems}
    answers = [answer for answer in answers if answer.problem in gradable_ids]
    if not answers:
        raise DirlError(f"{cfg.predictions} answers no problem that has a reference answer: check bench")

    # Verdicts come in any order, and are written in the file's.
    began = time.perf_counter()
    with Grader(cfg.grade_workers, cfg.grade_timeout) as grader:
        reached = tracked(regraded(answers, problems, grader), [], len(answers), console)
        verdicts = {(answer.problem, answer.sample): answer for answer in reached}
        print_ungraded(grader)
    seconds = time.perf_counter() - began
    answers = [verdicts[answer.problem, answer.sample] for answer in answers]

    lines = [{"index": index[answer.problem], "correct": answer.correct, "credit": answer.credit} for answer in answers]
    write_text(out / "graded.jsonl", (json.dumps(line) + "\n" for line in lines))
    write_text(out / ANSWERS, (json.dumps(asdict(answer)) + "\n" for answer in answers))
    write_json(out / SOURCE, {"problems": digests(problems)})
    conclude(cfg, out, cfg.predictions, answers, problems, {"predictions": cfg.predictions}, did_work=True)

    answered = {answer.problem for answer in answers}
    unanswered = len(gradable_ids - answered)
    if unanswered:
        console.print(f"{unanswered} of {len(problems)} problems have no answer in the file and do not count")
    speed = f"{len(answers):,} answers graded in {seconds:.1f} s, {len(answers) / seconds:,.0f} a second"
    console.print(f"{speed} · {out / 'graded.jsonl'} · {out / CARD}", soft_wrap=True)


def conclude(
    cfg: DictConfig,
    out: Path,
    name: str,
    answers: Sequence[GradedAnswer],
    problems: Sequence[Problem],
    facts: dict[str, Any],
    did_work: bool,
) -> Metrics:
    """Write the card of an evaluation and print its table. Returns the metrics over all problems.

    name: of the model, or of the file that the answers come from. facts: what else the card says of them.
    did_work: whether this start answered or graded any.
    """
    overall = measure(answers, with_votes=all(map(has_votes, problems)))
    subsets = measure_subsets(answers, problems)
    bench = to_dict(cfg.bench)
    all_published = bench.pop("published", {})
    card = {
        **facts,
        "bench": {**bench, "limit": cfg.limit, "ids": cfg.ids and list(cfg.ids)},
        "grade_timeout": cfg.grade_timeout,
        "versions": facts.get("versions", {}) | versions(*GRADERS) | {"python": platform.python_version()},
        "record": run_record(out, cfg.gpus * cfg.nodes, did_work),
        "metrics": asdict(overall),
        "subsets": {subset: asdict(metrics) for subset, metrics in subsets.items()},
    }

    if scorers := digests_by_scorer(problems):
        card["scorers"] = scorers

    # The papers give a figure for a model and a decoding strategy; a file of predictions does not say how it decoded.
    strategy = facts.get("decoding", {}).get("strategy")
    if figures := all_published.get(name, {}).get(strategy):
        card["published"] = report.beside(figures, overall, compare.settings(card))
    write_json(out / CARD, card)

    # A table's first column is called what the file calls its subsets, such as level.
    header = (bench.get("columns") or {}).get("subset", "")
    console.print(report.table(f"{name} on {cfg.bench.name}", {"all": overall, **subsets}, header))
    if "published" in card:
        console.print(report.spell_published(card["published"]))
    return overall


def chosen_problems(cfg: DictConfig) -> tuple[list[Problem], list[str]]:
    """The problems of cfg.bench that are to be answered, and lines on how they were read.

    Raises DirlError for an id that the benchmark does not have.
    """
    bench = build(cfg.bench)
    problems: list[Problem] = bench.problems()
    if cfg.ids:
        ids = [problem.id for problem in problems]
        for requested in cfg.ids:
            if requested not in ids:
                raise DirlError(f"{cfg.bench.name} has no problem {requested}: they go from {ids[0]} to {ids[-1]}")
        problems = [problem for problem in problems if problem.id in cfg.ids]
    return problems[: cfg.limit], bench.remarks()


def gradable(name: str, problems: Sequence[Problem], remarks: Sequence[str]) -> list[Problem]:
    """The problems that have a reference answer. Prints how many have none, and the remarks."""
    with_answer: list[Problem] = []
    left_out: list[Problem] = []
    for problem in problems:
        if problem.is_gradable:
            with_answer.append(problem)
        else:
            left_out.append(problem)
    if not with_answer:
        raise DirlError(f"no problem of {name} has a reference answer: fill in ground_truth_answer, or map it")
    if left_out:
        summary = f"{len(left_out)} of {len(problems)} problems have no answer and are left out"
        console.print(f"{summary} (first {left_out[0].id})", soft_wrap=True)
    for remark in remarks:
        console.print(f"{name}: {remark}", soft_wrap=True)
    return with_answer


def requested_answers(answers: Sequence[GradedAnswer], problems: Sequence[Problem], samples: int) -> list[GradedAnswer]:
    """The answers that this command asks for; an earlier start may have asked for more."""
    ids = {problem.id for problem in problems}
    return [answer for answer in answers if answer.problem in ids and answer.sample < samples]


def is_first() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def print_ungraded(grader: Grader) -> None:
    """Print how many answers could not be graded in time or memory, if any."""
    if grader.gave_up:
        console.print(f"{grader.gave_up} answers took too long or too much to compare and count as wrong")


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages, by name."""
    return {package: version(package) for package in packages}


def digests(problems: Sequence[Problem]) -> dict[str, str]:
    """By problem id, a digest of what is asked and of what it is graded by."""
    result = {}
    for problem in problems:
        texts = [problem.question, problem.answer]
        if problem.system:  # otherwise left out, so that digests of earlier evaluations stay valid
            texts.append(problem.system)
        if problem.verifier != PROBE.verifier:
            texts += [problem.verifier, json.dumps(problem.details)]
        result[problem.id] = hash_values(*texts)[:16]
    return result


def hash_values(*values: object) -> str:
    """A SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain containers, references resolved."""
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return {str(key): value for key, value in container.items()}
