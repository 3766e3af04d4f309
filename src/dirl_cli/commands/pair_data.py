"""The pairs that `dirl dpo` learns from: read from files or made of a run's answers, and shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from omegaconf import DictConfig

from dirl_cli.commands.dpo_parts import DpoParts
from dirl_cli.data.chat import Encoded
from dirl_cli.data.files import TrainingFile, sources_of
from dirl_cli.data.order import MixtureOrder, epochs, generator
from dirl_cli.data.preview import show_examples
from dirl_cli.data.tokens import TokenTable
from dirl_cli.dpo.pairs import Pairing, Pairs, TextPairs, all_of, pairs_of_run
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.report.progress import StepProgress
from dirl_cli.training.prepare import Questions, Reader


@dataclass(frozen=True)
class PairData:
    """What is learned from and measured on. names, weights: of the sources, as `training` and `held_out` have them."""

    names: list[str]
    weights: list[float]
    training: list[Pairs]
    held_out: list[Pairs]
    problems: Questions

    def order(self, seed: int) -> MixtureOrder:
        """The endless order in which the training pairs come."""
        return MixtureOrder(tuple(map(len, self.training)), tuple(self.weights), partial(generator, seed))


def read_pairs(
    cfg: DictConfig, parts: DpoParts, lm: DiffusionLM, accelerator: Accelerator, progress: StepProgress
) -> PairData:
    """The pairs of a run or of data's files. Raises DirlError where nothing of a source is left to learn from."""
    reader = Reader(lm, parts.instruction, accelerator, progress, cfg.max_tokens)
    problems = reader.problems("held-out problems", parts.data.problems()[: cfg.eval_problems])
    settings = cfg.dpo
    if settings.pairs_from:
        pairing = Pairing(
            settings.pairing,
            settings.pairs_per_problem,
            settings.held_out,
            min(cfg.max_tokens, lm.max_length),
            cfg.seed,
        )
        with progress.working(f"reading the answers of {settings.pairs_from}"):
            sampled = pairs_of_run(Path(settings.pairs_from), lm, pairing)
        for remark in sampled.remarks:
            progress.print_line(remark)
        return PairData([str(settings.pairs_from)], [1.0], [sampled.training], [sampled.held_out], problems)

    sources, weights = sources_of(parts.data)
    data = PairData([source.name for source in sources], list(weights), [], [], problems)
    for source in cast(Sequence[TrainingFile], sources):  # `require_pairs` sees to it
        training = reader.pairs(f"training pairs of {source.name}", source.pairs())
        held_out = reader.pairs(f"held-out pairs of {source.name}", source.validation_pairs())
        if not len(training.chosen):
            raise DirlError(f"no pair of {source.name} is left to learn from: raise max_tokens, or give other data")
        for tables, table in ((data.training, training), (data.held_out, held_out)):
            tables.append(TextPairs(table, lm.block_size, lm.pad_token_id, lm.stop_token_ids))
    return data


def preview(cfg: DictConfig, data: PairData, lm: DiffusionLM, progress: StepProgress) -> None:
    """Show the first pairs of each source as the model sees them, and how often each will be gone through."""
    tables: dict[str, TokenTable] = {}
    for name, pairs in zip(data.names, data.training, strict=True):
        columns: dict[str, list[Encoded]] = {"chosen": [], "rejected": []}
        for pair in all_of(pairs):
            for encoded, answer in zip(columns.values(), pair.answers, strict=True):
                trained = [False] * len(answer.prompt_ids) + [True] * len(answer.token_ids)
                encoded.append(([*answer.prompt_ids, *answer.token_ids], trained))
        tables |= {f"{name}, {column}": TokenTable.of(encoded) for column, encoded in columns.items()}
    show_examples(tables, lm.require_tokenizer(), progress.console)

    reached = epochs(data.order(cfg.seed), data.names, cfg.steps * cfg.batch_size)
    counts = " · ".join(f"{name} {n:.2f}" for name, n in reached.items())
    progress.print_line(f"after {cfg.steps} steps: {counts}")
