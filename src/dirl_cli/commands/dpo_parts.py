"""What the config of `dirl dpo` describes, and which of its choices exclude each other."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from dirl_cli.cli.build import build
from dirl_cli.data.files import Mix, TrainingFile
from dirl_cli.diffusion.states import MergedTrace, SampledTrace, Trace, Views
from dirl_cli.dpo.preference import Preference
from dirl_cli.errors import DirlError
from dirl_cli.models.peft import Peft
from dirl_cli.types import Decoding, Instruction


@dataclass(frozen=True)
class DpoParts:
    """What the config's groups describe."""

    model: Any
    peft: Peft
    data: Any
    views: Views
    preference: Preference
    optim: Any
    schedule: Any
    instruction: Instruction
    decoding: Decoding


def build_dpo_parts(cfg: DictConfig) -> DpoParts:
    """What the config's groups describe."""
    settings = cfg.dpo
    return DpoParts(
        model=build(cfg.model),
        peft=build(cfg.peft),
        data=build(cfg.data),
        views=build(cfg.likelihood),
        preference=Preference(
            settings.link,
            settings.beta,
            settings.label_smoothing,
            settings.length_normalised,
            settings.sft_weight,
        ),
        optim=build(cfg.optim),
        schedule=build(cfg.schedule),
        instruction=build(cfg.instruction, Instruction),
        decoding=build(cfg.decoding, Decoding),
    )


def require_pairs(cfg: DictConfig, parts: DpoParts) -> None:
    """Raises DirlError where there are no pairs, or not with what the likelihood asks of them."""
    if cfg.dpo.pairs_from:
        return
    if not isinstance(parts.data, TrainingFile | Mix):
        raise DirlError(
            f"data={cfg.data.name} holds no pairs: give a file of prompt, chosen and rejected, or a run of `dirl rl`"
            " with dpo.pairs_from=DIR"
        )
    if isinstance(parts.views, Trace | MergedTrace | SampledTrace):
        raise DirlError(
            f"the pairs of data={cfg.data.name} are texts, of which nobody knows how they came about: give"
            " likelihood=elbo, or pairs with reveal steps by dpo.pairs_from=DIR"
        )
