"""What an rl config's groups describe, and which of them exclude each other."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from dirl_cli.cli.build import build
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import Peft
from dirl_cli.reward.ranking import RANKINGS
from dirl_cli.reward.scoring import RewardSettings
from dirl_cli.rl.block_growth import BlockGrowth
from dirl_cli.rl.critic import LearnedCritic, NoCritic, require_whole_trace
from dirl_cli.rl.objective import Objective
from dirl_cli.rollout.engines import Engine, Native, Servers
from dirl_cli.sft.annealing import Annealing
from dirl_cli.types import Decoding, Instruction


@dataclass(frozen=True)
class RlParts:
    """What the config's groups describe."""

    model: Any
    peft: Peft
    data: Any
    optim: Any
    schedule: Any
    engine: Any
    annealing: Annealing
    objective: Objective
    critic: NoCritic | LearnedCritic
    reward_settings: RewardSettings
    decoding: Decoding
    instruction: Instruction


def build_rl_parts(cfg: DictConfig) -> RlParts:
    """What the config's groups describe."""
    return RlParts(
        model=build(cfg.model),
        peft=build(cfg.peft),
        data=build(cfg.data),
        optim=build(cfg.optim),
        schedule=build(cfg.schedule),
        engine=build(cfg.rollout),
        annealing=build(cfg.annealing, Annealing),
        objective=build(cfg.algo, Objective),
        critic=build(cfg.critic),
        reward_settings=build(cfg.reward, RewardSettings),
        decoding=build(cfg.decoding, Decoding),
        instruction=build(cfg.instruction, Instruction),
    )


def settle_ratio(rl: DictConfig) -> None:
    """Put what an on-policy or an off-policy rollout wants in the place of `old: auto` and of no `correction_cap`."""
    if rl.old == "auto":
        rl.old = "trainer" if rl.async_rollout else "sampler"
    if rl.correction_cap is None:
        rl.correction_cap = 2.0 if rl.async_rollout else 0.0


def require_compatible(rl: DictConfig, objective: Objective, decoding: Decoding) -> None:
    """Raises DirlError for choices that exclude each other, before anything is loaded."""
    if rl.correction_cap and not (rl.old == "trainer" and objective.is_exact):
        raise DirlError(
            "rl.correction_cap wants rl.old=trainer and an algorithm that scores the true trace, as dipo: set it to 0"
        )
    if decoding.temperature == 0 and not rl.replay:
        raise DirlError("decoding.temperature=0 gives a group equal answers, from which there is nothing to learn")


def require_kept(rl: DictConfig, settings: RewardSettings) -> None:
    """Raises DirlError where the filter would drop groups that a ranking of right answers can be learned from."""
    ranks = any(name in RANKINGS and weight for name, weight in settings.weights.items())
    filters = not rl.replay or rl.rescore
    if ranks and filters and rl.filter == "accuracy" and not rl.rollout_only:
        raise DirlError(
            "reward.weights.speed_rank tells right answers apart, and rl.filter=accuracy drops groups that are all"
            " right: give rl.filter=reward"
        )


def require_hints(rl: DictConfig, engine: Engine) -> None:
    """Raises DirlError where hints are asked for of an engine that cannot hold tokens."""
    if rl.hints and not isinstance(engine, Native):
        raise DirlError("rl.hints wants rollout=native, the engine that can hold parts of a solution in an answer")


def require_ahead(rounds: int, engine: Engine, annealing: Annealing) -> None:
    """Raises DirlError where answers are to be under way while weights are pushed, and something keeps them from it."""
    can_leave = isinstance(engine, Native) or (isinstance(engine, Servers) and engine.engine != "lmdeploy")
    if rounds > 1 and not can_leave:
        raise DirlError("rl.async_rollout above 1 leaves answers half done, which LMDeploy cannot: give rollout=native")
    if rounds > 1 and annealing.block_sizes:
        raise DirlError(
            "rl.async_rollout above 1 samples the answers of several steps together, and annealing.block_sizes gives"
            " these blocks of several sizes: give rl.async_rollout=1, or leave annealing.block_sizes out"
        )


def require_growth(parts: RlParts, lm: DiffusionLM) -> None:
    """Raises DirlError for annealing that cannot lead to the model's blocks, or that is of more than block sizes."""
    annealing = parts.annealing
    annealing.check(lm.block_size)
    if annealing.masked < 1 or annealing.causal_weight:
        raise DirlError(
            "annealing.masked and annealing.causal_weight are of dirl sft, which has masks to draw and a loss beside:"
            " leave annealing at none and give annealing.block_sizes and annealing.share"
        )
    if annealing.block_sizes and not isinstance(parts.engine, Native):
        raise DirlError("annealing.block_sizes wants rollout=native: other engines sample in blocks of one size")


def require_measured_growth(cfg: DictConfig, annealing: Annealing) -> None:
    """Raises DirlError where stages of blocks are to end by what is held out, and nothing tells in time."""
    annealing.require_evaluations(cfg.eval_every)
    if annealing.patience and (cfg.rl.async_rollout or cfg.rl.replay or cfg.rl.rollout_only):
        raise DirlError(
            "annealing.patience ends a stage by what was just learned: leave out rl.async_rollout, rl.replay and"
            " rl.rollout_only, or give annealing.share alone"
        )


def block_growth(cfg: DictConfig, parts: RlParts, lm: DiffusionLM) -> BlockGrowth:
    """The block size of each step. lm: the model in the blocks of the run's end."""
    if stages := parts.annealing.stages(lm.block_size, "greedy_accuracy"):
        return BlockGrowth(measured=stages)
    sizes = [parts.annealing.block_size(lm.block_size, step / cfg.steps) for step in range(cfg.steps)]
    return BlockGrowth.of(sizes, lm.block_size)


def require_steps(parts: RlParts, launch: str) -> None:
    """Raises DirlError where steps have values or rewards and the algorithm does not score them all."""
    if isinstance(parts.critic, LearnedCritic):
        parts.critic.require(parts.peft, launch)
        require_whole_trace(parts.objective, "a critic")
    if parts.critic.gamma < 1:
        require_whole_trace(parts.objective, f"critic.gamma={parts.critic.gamma:g}")
    if parts.reward_settings.process:
        require_whole_trace(parts.objective, "reward.process")
