"""The problems that a run learns from and is measured on, with their prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from accelerate import Accelerator
from omegaconf import DictConfig

from dirl_cli.commands.rl_parts import RlParts
from dirl_cli.data.chat import tokenize
from dirl_cli.data.files import sources_of
from dirl_cli.data.preview import show_examples
from dirl_cli.data.tokens import TokenTable
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.report.progress import StepProgress
from dirl_cli.rl.hints import require_solutions
from dirl_cli.training.prepare import Questions, Reader, fingerprint_of
from dirl_cli.types import Problem


@dataclass(frozen=True)
class Pools:
    """The problems to learn from, by source, and those to measure on. names, weights: of the sources.

    solutions: of the training problems, in tokens, where hints are taken from them.
    """

    names: list[str]
    weights: list[float]
    training: list[Questions]
    held_out: Questions
    solutions: list[TokenTable]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that a run learns from."""
        return fingerprint_of([*self.training, *self.solutions])

    @property
    def longest_prompt(self) -> int:
        """In tokens; 0 where a replay brings its own."""
        prompts = chain.from_iterable(pool.prompts for pool in self.training)
        return max(map(len, prompts), default=0)


def read_problems(
    cfg: DictConfig, parts: RlParts, lm: DiffusionLM, accelerator: Accelerator, progress: StepProgress
) -> Pools:
    """The problems with their prompts. Raises DirlError where nothing of a source is left to learn from."""
    reader = Reader(lm, parts.instruction, accelerator, progress, max_prompt_tokens=cfg.rl.max_prompt_tokens)
    sources, weights = sources_of(parts.data)
    if cfg.rl.replay:  # which brings problems of its own
        sources, weights = [], []

    pools: dict[str, Questions] = {}
    for source in sources:
        title = f"training problems of {source.name}"
        pools[source.name] = reader.problems(title, source.training_problems(), source.remarks())
        if not pools[source.name].problems:
            raise DirlError(
                f"nothing of {source.name} is left to learn from: raise rl.max_prompt_tokens, or give other data"
            )

    solutions = []
    if cfg.rl.hints:
        solutions = [solution_tokens(pool.problems, lm, parts.instruction.think) for pool in pools.values()]
    if cfg.dry_run:
        preview(pools, lm, progress)
        held_out = Questions([], [])
    else:
        held_out = reader.problems("held-out problems", parts.data.problems()[: cfg.eval_problems])
    return Pools(list(pools), list(weights), list(pools.values()), held_out, solutions)


def solution_tokens(problems: Sequence[Problem], lm: DiffusionLM, think: bool) -> TokenTable:
    """The problems' worked solutions. think: whether prompts end in `<think>`. Raises DirlError where one has none."""
    require_solutions(problems)
    texts = []
    for problem in problems:
        texts.append(problem.solution.removeprefix("<think>") if think else problem.solution)
    return TokenTable.of([(ids, [False] * len(ids)) for ids in tokenize(lm.require_tokenizer(), texts)])


def preview(pools: Mapping[str, Questions], lm: DiffusionLM, progress: StepProgress) -> None:
    """Show the first prompts of each source as the model sees them, and their reference answers."""
    prompts, answers = {}, {}
    for name, pool in pools.items():
        prompts[name] = TokenTable.of([(prompt, [False] * len(prompt)) for prompt in pool.prompts])
        answers[name] = [problem.answer for problem in pool.problems]
    show_examples(prompts, lm.require_tokenizer(), progress.console, answers)
