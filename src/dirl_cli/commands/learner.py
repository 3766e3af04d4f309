"""What learns: the policy's update with its reference or teacher, and its critic."""

from collections.abc import Callable
from functools import partial

from accelerate import Accelerator
from omegaconf import DictConfig

from dirl_cli.commands.problems import Pools
from dirl_cli.commands.rl_parts import RlParts
from dirl_cli.commands.start import compile_as_asked, load_on_device, shapes_of
from dirl_cli.errors import DirlError
from dirl_cli.models.context import ContextGroup
from dirl_cli.models.load import DiffusionLM, SavedModel
from dirl_cli.models.peft import FullFinetune
from dirl_cli.models.sharded_tensors import is_sharded
from dirl_cli.rl.block_growth import BlockGrowth
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.critic import Critic, LearnedCritic, StepAdvantages
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.teacher import TeacherPrompt
from dirl_cli.rl.update import PolicyUpdate, reference_model
from dirl_cli.training.layers import checkpoint_layers
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import context_group
from dirl_cli.training.sharded_model import reference_copy
from dirl_cli.training.trainer import Trainer


def policy_update(
    cfg: DictConfig,
    parts: RlParts,
    lm: DiffusionLM,
    inference_lm: DiffusionLM,
    accelerator: Accelerator,
    updates: int,
    growth: BlockGrowth,
) -> PolicyUpdate:
    """What updates the model, `updates` times in all, and keeps it near a reference where that is asked for.

    inference_lm: the model without an adapter.
    """
    objective = parts.objective
    context = context_group(accelerator, cfg.context_parallel)
    schedule = partial(parts.schedule, steps=updates)
    critic = None
    gae_lambda = 1.0
    if isinstance(parts.critic, LearnedCritic):
        critic = start_critic(cfg, parts.critic, lm, accelerator, schedule, context)
        gae_lambda = parts.critic.gae_lambda
    trainer = Trainer(
        accelerator,
        LogprobModel(lm.model, lm.unsampled_ids, parts.decoding, context=context),
        parts.optim.build(lm.model),
        schedule,
        cfg.clip_norm,
        cfg.max_skipped,
        cfg.skip_norm,
        context=context,
    )
    return PolicyUpdate(
        trainer,
        objective,
        objective.estimator(parts.reward_settings.weights),
        lm,
        reference=start_reference(cfg, parts, lm, inference_lm, accelerator, context),
        old_from_sampler=cfg.rl.old == "sampler" and objective.is_exact,
        correction=Correction(
            cfg.rl.correction_cap, cfg.rl.correction_floor, cfg.rl.correction_level, cfg.rl.correction
        ),
        mini_batches=cfg.rl.mini_batches,
        epochs=cfg.rl.epochs,
        train_tail=cfg.rl.train_tail,
        row_tokens=cfg.row_tokens,
        micro_rows=cfg.micro_rows,
        longest=parts.decoding.max_new_tokens,
        seed=cfg.seed,
        peft=parts.peft,
        critic=critic,
        step_advantages=StepAdvantages(parts.critic.gamma, gae_lambda),
        teacher_prompt=teacher_prompt_of(cfg, parts, lm),
        growth=growth,
    )


def start_reference(
    cfg: DictConfig,
    parts: RlParts,
    lm: DiffusionLM,
    inference_lm: DiffusionLM,
    accelerator: Accelerator,
    context: ContextGroup,
) -> LogprobModel | None:
    """The model to stay near, where the objective asks for one.

    inference_lm: the model without an adapter, whose copy a reference that moves is.
    """
    objective = parts.objective
    if objective.other_teacher:
        teacher = load_on_device(cfg, SavedModel("teacher", objective.other_teacher).load, accelerator)
        teacher.model.requires_grad_(False)
    elif objective.beta and objective.reference_every and not is_sharded(lm.model):
        teacher = FullFinetune().reference(inference_lm)
    elif objective.beta:
        teacher = reference_copy(lm, parts.peft)
    else:
        return None
    compile_as_asked(cfg, teacher.model)
    return reference_model(teacher, parts.decoding, context)


def teacher_prompt_of(cfg: DictConfig, parts: RlParts, lm: DiffusionLM) -> TeacherPrompt | None:
    """How problems are put to a teacher that reads another prompt than the policy."""
    objective = parts.objective
    if not objective.teacher_prompt:
        return None
    positions = lm.max_length
    if objective.other_teacher:
        positions = shapes_of(cfg, SavedModel("teacher", objective.other_teacher)).max_length
    tokenizer = lm.require_tokenizer()
    return TeacherPrompt(objective.teacher_prompt, tokenizer, parts.instruction, lm.block_size, positions)


def require_teacher_room(teacher_prompt: TeacherPrompt, pools: Pools, lm: DiffusionLM, max_new_tokens: int) -> None:
    """Raises DirlError for a problem whose longest answer the teacher has no room for behind its own prompt."""
    for pool in pools.training:
        prompts = zip(pool.problems, pool.prompts, teacher_prompt.encode(pool.problems), strict=True)
        for problem, prompt, teachers in prompts:
            answer = whole_blocks(len(prompt) + max_new_tokens, lm) - len(prompt)
            filler = teacher_prompt.filler(teachers, len(prompt))
            teacher_prompt.require_room(problem, filler + len(teachers) + answer)


def whole_blocks(length: int, lm: DiffusionLM) -> int:
    """The tokens of a sequence whose last block is filled up, as far as the model has positions."""
    return min(-(-length // lm.block_size) * lm.block_size, lm.longest_prompt + 1)


def teacher_parameters(cfg: DictConfig, objective: Objective, lm: DiffusionLM) -> int:
    """How many parameters a teacher has; 0 without one. Raises DirlError for one that could not teach `lm`."""
    if not objective.other_teacher:
        return 0
    teacher = shapes_of(cfg, SavedModel("teacher", objective.other_teacher))
    require_same_tokens(teacher, lm)
    return sum(parameter.numel() for parameter in teacher.model.parameters())


def require_same_tokens(teacher: DiffusionLM, lm: DiffusionLM) -> None:
    """Raises DirlError for a teacher with other tokens, blocks or mask, which could not score the policy's states."""
    reason = None
    if teacher.block_size != lm.block_size:
        reason = f"blocks of {teacher.block_size}, and the policy of {lm.block_size}"
    elif teacher.mask_token_id != lm.mask_token_id:
        reason = f"the mask token {teacher.mask_token_id}, and the policy {lm.mask_token_id}"
    elif teacher.tokenizer and lm.tokenizer and teacher.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        reason = "other tokens than the policy"
    if reason:
        raise DirlError(f"the teacher has {reason}: give algo.teacher a model of the same family")


def start_critic(
    cfg: DictConfig,
    settings: LearnedCritic,
    lm: DiffusionLM,
    accelerator: Accelerator,
    schedule: Callable[[int], float],
    context: ContextGroup,
) -> Critic:
    """The critic of a policy that has not learned yet, which takes a step with every one of the policy's."""
    model = settings.model(lm, context)
    if settings.separate:
        checkpoint_layers(model.decoder, cfg.gradient_checkpointing)
        compile_as_asked(cfg, model.decoder)
    optimizers = [settings.optimizer(model)]
    trainer = Trainer(
        accelerator,
        model,
        optimizers,
        schedule,
        cfg.clip_norm,
        cfg.max_skipped,
        cfg.skip_norm,
        rate="critic.lr",
        context=context,
    )
    return Critic(trainer, settings.value_clip)
