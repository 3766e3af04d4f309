"""Where groups of answers come from: the sampler and the curriculum, or an earlier run's rollouts."""

from functools import partial
from itertools import chain
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig

from dirl_cli.commands.problems import Pools
from dirl_cli.commands.rl_parts import RlParts
from dirl_cli.data.chat import answer_text
from dirl_cli.data.files import trusted_scorers
from dirl_cli.models.load import DiffusionLM, pick_dtype
from dirl_cli.models.peft import FullFinetune
from dirl_cli.models.sharded_tensors import is_sharded
from dirl_cli.reward.scoring import RewardComputer
from dirl_cli.rl.block_growth import BlockGrowth
from dirl_cli.rl.curriculum import EVERYTHING, Curriculum
from dirl_cli.rl.hints import Hints, cut_at
from dirl_cli.rl.replay import ReplayedRollouts, Rescorer, rollouts_of
from dirl_cli.rl.rollout_state import RolloutSource
from dirl_cli.rl.rollouts import SampledRollouts, problem_order
from dirl_cli.rollout.engines import Native, Servers
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.rollout.server_keeper import ServerKeeper
from dirl_cli.training.sharded_model import model_to_sample


def rollout_source(
    cfg: DictConfig,
    parts: RlParts,
    pools: Pools,
    lm: DiffusionLM,
    sampler: Sampler,
    reward_computer: RewardComputer,
    accelerator: Accelerator,
    growth: BlockGrowth,
) -> RolloutSource:
    """Where groups of answers come from: the sampler, or an earlier run's rollouts."""
    decode = partial(answer_text, lm.require_tokenizer()) if parts.reward_settings.process else None
    if cfg.rl.replay:
        scorers = trusted_scorers(parts.data)
        rescorer = Rescorer(reward_computer, cfg.rl.filter, parts.decoding.max_new_tokens, decode, scorers)
        files = rollouts_of(Path(cfg.rl.replay), cfg.steps)
        return ReplayedRollouts(files, lm, rescorer if cfg.rl.rescore else None, growth)
    curriculum = EVERYTHING
    if cfg.rl.curriculum:
        hardest, easiest = cfg.rl.curriculum
        curriculum = Curriculum(hardest, easiest, cfg.rl.curriculum_rest)
    return SampledRollouts(
        list(chain.from_iterable(pool.problems for pool in pools.training)),
        list(chain.from_iterable(pool.prompts for pool in pools.training)),
        lm,
        sampler,
        reward_computer,
        parts.decoding,
        accelerator,
        problems_per_step=cfg.rl.problems,
        group_size=cfg.rl.group_size,
        filter=cfg.rl.filter,
        max_rounds=cfg.rl.max_rounds,
        order=problem_order([len(pool.problems) for pool in pools.training], pools.weights, cfg.seed),
        seed=cfg.seed,
        sources=pools.names,
        rounds_ahead=cfg.rl.async_rollout,
        partial_rollouts=cfg.rl.partial_rollouts,
        most_stale=max(cfg.rl.async_rollout, 1) * cfg.rl.mini_batches * cfg.rl.epochs,
        curriculum=curriculum,
        decode=decode,
        hints=Hints(cfg.rl.hints, tuple(cfg.rl.hint_share), tuple(cfg.rl.hint_tokens)),
        solutions=hintable_solutions(pools, parts, lm),
        growth=growth,
    )


def hintable_solutions(pools: Pools, parts: RlParts, lm: DiffusionLM) -> list[list[int]]:
    """The training problems' solutions as an answer may hold them: to the first token that would end it."""
    ends = {*parts.decoding.stop_token_ids, *lm.unsampled_ids}
    solutions = []
    for table in pools.solutions:
        solutions += [cut_at(table[i][0], ends) for i in range(len(table))]
    return solutions


def start_sampler(cfg: DictConfig, parts: RlParts, lm: DiffusionLM, keeper: ServerKeeper) -> Sampler:
    """The engine with weights to sample from; a copy of them where they would change while it samples."""
    if isinstance(parts.engine, Servers):  # which hold weights of their own
        return parts.engine.start(lm, end=keeper.end)
    sampler_lm = lm
    if is_sharded(lm.model):
        sampler_lm = model_to_sample(lm, parts.peft, pick_dtype(cfg.dtype, lm.device.type))
    if cfg.rl.async_rollout and sampler_lm is lm and isinstance(parts.engine, Native):
        sampler_lm = FullFinetune().reference(lm)
    sampler: Sampler = parts.engine.start(sampler_lm, own_weights=sampler_lm is not lm)
    return sampler
