"""What `dirl eval` would take, without starting it."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.commands.start import planned_machine, planned_time
from dirl_cli.console import PlainConsole
from dirl_cli.data.chat import encode_problems
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.result_card import CARD, read_card
from dirl_cli.models.shapes import outline
from dirl_cli.plan.eval_forecast import EVAL, eval_budget
from dirl_cli.plan.time import NOTHING_ASSUMED, Assumptions
from dirl_cli.rollout.engines import Servers, require_strategy
from dirl_cli.types import Decoding, Instruction, Problem

PROMPT = 256  # tokens of a problem of which nothing is known


def plan_evaluation(cfg: DictConfig, out: Path, problems: Sequence[Problem], count: int, console: PlainConsole) -> None:
    """Show the configuration, and the memory and time that the evaluation takes. Raises DoesNotFit.

    problems: none where the benchmark is not here; then there are `count` of them.
    """
    lm = outline(build(cfg.model), cfg.attention)
    decoding = lm.decoding(build(cfg.decoding, Decoding))
    if problems and lm.tokenizer is not None:
        instruction = build(cfg.instruction, Instruction)
        prompts = encode_problems(lm.tokenizer, problems, instruction, lm.longest_prompt)
    else:
        missing = f"no tokenizer of {cfg.model.name}" if problems else f"no problem of {cfg.bench.name}"
        console.print(f"{missing} is here: {count:,} prompts are taken to be {PROMPT} tokens", soft_wrap=True)
        prompts = [[0] * PROMPT] * count

    machine = planned_machine(cfg, None)
    settings = {key: OmegaConf.select(cfg, key) for key in EVAL}
    assumptions = planned_time(cfg, machine, known_answers(cfg, out, decoding.strategy))
    engine = build(cfg.rollout)
    if isinstance(engine, Servers):
        raise DirlError("dry_run tells what sampling takes here, and rollout=server samples elsewhere: leave one out")
    require_strategy(engine, decoding)
    budget = eval_budget(lm, machine, settings, engine, decoding, prompts, cfg.samples, assumptions)
    budget.show(OmegaConf.to_container(cfg), console)


def known_answers(cfg: DictConfig, out: Path, strategy: str) -> Assumptions:
    """How long answers are and how fast: as this evaluation found before, or as was published of the model."""
    metrics = read_card(out).get("metrics", {})  # lm-eval's tasks and likelihoods have none
    if metrics.get("length") and metrics.get("tokens_per_forward"):
        length = round(metrics["length"])
        return Assumptions(None, length, metrics["tokens_per_forward"], f"as {out / CARD} has it")

    published = OmegaConf.select(cfg.bench, f"published.{cfg.model.name}.{strategy}")
    if published is None:
        return NOTHING_ASSUMED
    _, tokens_per_step, length = published
    return Assumptions(None, round(length), tokens_per_step, "as published")
