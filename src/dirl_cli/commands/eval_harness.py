"""`dirl eval harness=[…]`: tasks of lm-evaluation-harness, with tokens per forward beside their scores."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.commands.loaded_model import load_for_answers
from dirl_cli.console import PlainConsole, working
from dirl_cli.errors import DirlError, pip_install
from dirl_cli.evaluation.harness_results import facts_text, score_line, scores_of, scores_table
from dirl_cli.evaluation.report import csv_text
from dirl_cli.evaluation.result_card import CARD, SOURCE, require_same
from dirl_cli.evaluation.run_record import run_record
from dirl_cli.files import installed, write_json, write_text
from dirl_cli.models.load import fingerprint
from dirl_cli.types import Decoding

SAMPLES = "samples.jsonl"
SCORES = "harness.csv"
REQUESTS = "requests.db"  # answers by request, with which a run goes on


def evaluate_harness(cfg: DictConfig, out: Path, console: PlainConsole) -> None:
    """Put the tasks cfg.harness to cfg.model: scores go to `out`/eval_card.json, each answer to `out`/samples.jsonl."""
    require_harness(cfg)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with working(console, "reading lm-eval's tasks"):
        manager = task_manager(cfg.harness_settings.tasks_from)
    require_tasks(cfg.harness, manager)

    # Parts: all of them are checked before the model takes its time to load.
    from dirl_cli.harness.lm_eval_model import DirlModel
    from dirl_cli.harness.log_likelihoods import Scoring
    from dirl_cli.rollout.engines import require_strategy

    settings = cfg.harness_settings
    scoring = Scoring(settings.likelihood, settings.draws, settings.rates, settings.row_tokens, cfg.seed)
    engine = build(cfg.rollout)
    decoding = replace(build(cfg.decoding, Decoding), max_new_tokens=settings.max_new_tokens)
    require_strategy(engine, decoding)
    engine.require()
    lm = load_for_answers(cfg, cfg.device, console)
    model = DirlModel(engine.start(lm), decoding, scoring)
    if settings.chat_template and model.tokenizer.chat_template is None:
        raise DirlError("the tokenizer has no chat template: give harness_settings.chat_template=false")

    # The answers of an earlier start count, if they came from the same weights.
    weights = fingerprint(lm.model)
    require_same(out / SOURCE, {"weights": weights, "problems": {}})
    with answers_kept(out / REQUESTS) as answered:
        model.answered = answered
        earlier = len(answered)
        results = run_tasks(cfg, model, manager)
        did_work = len(answered) > earlier

    scores = scores_of(results["results"])
    facts = model.facts()
    write_text(out / SAMPLES, (json.dumps(line, default=str) + "\n" for line in sample_lines(results["samples"])))
    write_text(out / SCORES, csv_text([score_line(scores, facts)]))
    write_json(out / CARD, card_of(cfg, model, results, facts, weights) | {"record": run_record(out, 1, did_work)})
    title = f"{cfg.model.name} on {', '.join(cfg.harness)}"
    console.print(scores_table(title, scores))
    console.print(facts_text(facts), soft_wrap=True)
    console.print(f"{out / CARD} · {out / SCORES} · {out / SAMPLES}", soft_wrap=True)


def require_harness(cfg: DictConfig) -> None:
    """Raises DirlError where lm-eval is not installed, and for a setting that its tasks have no use for."""
    if find_spec("lm_eval") is None:
        raise DirlError(f"harness={list(cfg.harness)} wants lm-evaluation-harness: {pip_install('lm-eval')}")
    for key in ("predictions", "ids", "dry_run"):
        if cfg[key]:
            raise DirlError(f"{key} is of a bench, and harness=… asks lm-eval's tasks: leave it out")
    if cfg.samples > 1:
        raise DirlError("samples is of a bench: an lm-eval task says itself, as repeats, how often it is answered")
    if cfg.gpus * cfg.nodes > 1:
        raise DirlError("harness=… runs in one process: leave gpus and nodes at 1, and start one for each task instead")


@cache
def task_manager(tasks_from: str | None) -> Any:
    """lm-eval's tasks by name, and those of the YAML files in a directory, read once for the jobs of a sweep.

    Raises DirlError where the directory is not there.
    """
    from lm_eval.tasks import TaskManager

    if tasks_from and not Path(tasks_from).is_dir():
        raise DirlError(f"harness_settings.tasks_from={tasks_from} is no directory: give one of YAML files with tasks")
    return TaskManager(include_path=tasks_from)


def require_tasks(tasks: Sequence[str], manager: Any) -> None:
    """Raises DirlError for the first name that is no task, group or tag of lm-eval's."""
    for task in tasks:
        if task not in manager.all_tasks:
            close = get_close_matches(task, manager.all_tasks, n=1)
            remedy = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` prints all"
            raise DirlError(f"harness={task}: lm-eval has no such task; {remedy}")


def answers_kept(path: Path) -> Any:
    """The answers of a file by request, a mapping that writes each as it is set; a context that closes it."""
    from sqlitedict import SqliteDict

    # As JSON, since it would pickle them, and what lies in a run directory must not run code.
    return SqliteDict(str(path), autocommit=True, encode=json.dumps, decode=json.loads)


def run_tasks(cfg: DictConfig, model: Any, manager: Any) -> dict[str, Any]:
    """lm-eval's results. Raises DirlError for a task's data that are not here, and for code that must not be run."""
    from lm_eval import simple_evaluate

    settings = cfg.harness_settings
    if settings.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        results: Any = simple_evaluate(
            model=model,
            tasks=list(cfg.harness),
            num_fewshot=settings.fewshot,
            limit=cfg.limit,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            task_manager=manager,
            confirm_run_unsafe_code=settings.run_code,
            random_seed=cfg.seed,
            numpy_random_seed=cfg.seed,
            torch_random_seed=cfg.seed,
            fewshot_random_seed=cfg.seed,
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise DirlError(
            f"the data of {', '.join(cfg.harness)} cannot be read ({reason}): correct their path, or give the same"
            " command once where the Hub can be reached, which keeps them on this machine"
        ) from error
    except ImportError as error:
        raise DirlError(
            f"harness={list(cfg.harness)} wants a package that is not here ({error}): install it, or what most tasks"
            f" want with {pip_install('lm-eval')}"
        ) from error
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise DirlError(
            f"{', '.join(cfg.harness)} runs the code that the model writes: give harness_settings.run_code=true in a"
            " container that holds nothing of worth, or choose other tasks"
        ) from error
    return dict(results)


def sample_lines(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each answered document as a line: what was asked, answered and expected."""
    lines = []
    for task, answered in samples.items():
        for sample in answered:
            lines.append(
                {
                    "task": task,
                    "doc_id": sample["doc_id"],
                    "arguments": sample["arguments"],
                    "target": sample["target"],
                    "answers": sample["resps"],
                    "filter": sample["filter"],
                    "metrics": {name: sample[name] for name in sample["metrics"]},
                }
            )
    return lines


def card_of(
    cfg: DictConfig, model: Any, results: dict[str, Any], facts: dict[str, Any], weights: str
) -> dict[str, Any]:
    """The card: settings, lm-eval's results and the versions of its tasks, and what was measured beside them."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    lm = model.lm
    return {
        "model": {**settings["model"], "block_size": lm.block_size, "mask_token_id": lm.mask_token_id},
        "harness": {"tasks": settings["harness"], **settings["harness_settings"], "limit": cfg.limit},
        "decoding": {**asdict(model.decoding), "block_size": lm.block_size},
        "dtype": cfg.dtype,
        "attention": cfg.attention,
        "device": str(lm.device),
        "sampled_from": {"weights": weights},
        "versions": {package: installed(package) for package in ("dirl", "torch", "transformers", "lm_eval")},
        "task_versions": results["versions"],
        "results": json.loads(json.dumps(results["results"], default=str)),
        "facts": facts,
    }
