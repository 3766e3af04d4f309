"""Five optimizer steps of one process among several, on what is the same everywhere: what it sees and ends with.

python -m tests.helpers.steps FILE LAUNCH sft+rl+… [KEY=VALUE …]  # RANK, WORLD_SIZE, … as torchrun has them
"""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from dirl_cli.diffusion.masking import CountPerBlock, example
from dirl_cli.diffusion.states import BlockMasks, BlockSpec, Trace
from dirl_cli.dpo.batches import PairRows
from dirl_cli.dpo.pairs import Pair
from dirl_cli.dpo.preference import Preference
from dirl_cli.models.load import DiffusionLM
from dirl_cli.models.peft import FullFinetune, LoraFinetune, Peft, trainable_parameters
from dirl_cli.models.sharded_tensors import unsharded
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.critic import Critic, LearnedCritic, StepAdvantages
from dirl_cli.rl.groups import add_advantages
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.teacher import TeacherPrompt
from dirl_cli.rl.update import PolicyUpdate
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.storage import Record
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.certainty import finetuning_loss
from dirl_cli.training.layers import compile_layers
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import AdamW, Muon
from dirl_cli.training.parallel import context_group, start_accelerator
from dirl_cli.training.sharded_model import load_sharded, model_to_sample
from dirl_cli.training.trainer import Sums, Trainer
from dirl_cli.types import SHARDED_LAUNCHES, Decoding, Instruction, Problem, Trajectory
from tests.helpers.algorithms import algorithm
from tests.helpers.processes import run_together
from tests.helpers.small import MASK, PAD, Numbers, small_lm

STEPS = 5
LORA = LoraFinetune(("q_proj", "o_proj", "down_proj"), rank=3, alpha=6, dropout=0.0, four_bit=False, seed=0)
PEFT: dict[str, Peft] = {"none": FullFinetune(), "lora": LORA, "qlora": replace(LORA, four_bit=True)}
COMPARED = (
    "loss",
    "grad_norm",
    "certainty_loss",
    "right",
    "value_loss",
    "value_grad_norm",
    "kl",
    "correction",
    "correction_ess",
    "correction_cut",
)
OPTIMIZERS = {
    "adamw": AdamW(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    "muon": Muon(lr=1e-2, momentum=0.95, adamw_lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
}


class Small:
    """Settings of a model that is made on the spot."""

    def load(self, dtype: str, device: str, attention: str) -> DiffusionLM:
        return small_lm(scale=1.0)


def numbers(first: int, many: int) -> list[int]:
    """So many token ids, which depend on the first."""
    return [2 + (first * 7 + i * i * 5) % (MASK - 2) for i in range(many)]


def cross_entropy(rows, logprobs: Tensor, entropy: Tensor, _: Tensor) -> Sums:
    return {"loss": -(rows.weight * logprobs).sum(), "entropy": entropy.sum()}


def sft(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """Demonstrations of 9 to 50 tokens."""
    noise = Noise(CountPerBlock(), lm.block_size, MASK, PAD, row_tokens=64)
    found = []
    for step in range(STEPS):
        prompts = [(numbers(step + i, 5 + i), 4 + 40 * i // 6) for i in range(6)]
        demonstrations = [
            example(prompt + numbers(i, answer), [False] * len(prompt) + [True] * answer, lm.block_size, PAD)
            for i, (prompt, answer) in enumerate(prompts)
        ]
        rows, answer_tokens = noise.rows(demonstrations, step)
        found.append(trainer.step(trainer.cut(rows, micro_rows), cross_entropy, answer_tokens))
    trainer.measure(trainer.cut(rows, micro_rows), cross_entropy, answer_tokens)
    return found


def certain(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """Demonstrations that the model gives itself, much of which is right and to be surer."""
    still = small_lm(scale=1.0)
    answers = NativeSampler(still).sample([numbers(i, 3 + 2 * i) for i in range(5)], 1, Decoding(max_new_tokens=16))
    demonstrations = []
    for [one] in answers:
        trained = [False] * len(one.prompt_ids) + [True] * len(one.token_ids)
        demonstrations.append(example([*one.prompt_ids, *one.token_ids], trained, lm.block_size, PAD))
    noise = Noise(CountPerBlock(), lm.block_size, MASK, PAD, row_tokens=64)
    found = []
    for step in range(STEPS):
        rows, answer_tokens = noise.rows(demonstrations, step)
        loss = finetuning_loss(2.0, answer_tokens, hidden=len(rows.targets))
        found.append(trainer.step(trainer.cut(rows, micro_rows), loss, answer_tokens))
    assert found[0]["right"] > 0.1
    return found


def with_critic(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """As `rl`, with a second model that learns values, some of whose losses are clipped."""
    settings = LearnedCritic(True, 0.9, 0.8, 0.02, 1e-2, (0.9, 0.95), 1e-8, 0.0)
    as_it_began = small_lm(scale=1.0)  # since the policy's own parameters are shared out already
    as_it_began.model.to(trainer.accelerator.device)
    model = settings.model(as_it_began, trainer.context)
    optimizers = [settings.optimizer(model)]
    learner = Trainer(trainer.accelerator, model, optimizers, lambda step: 1.0, clip_norm=0.5, context=trainer.context)
    critic, advantages = Critic(learner, settings.value_clip), StepAdvantages(settings.gamma, settings.gae_lambda)
    return rl(lm, trainer, micro_rows, critic=critic, step_advantages=advantages)


def with_head(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """As `rl`, with a layer on the policy's hidden states that learns values."""
    settings = LearnedCritic(False, 0.9, 0.8, 0.02, 1e-1, (0.9, 0.95), 1e-8, 0.0)
    model = settings.model(lm, trainer.context)
    optimizers = [settings.optimizer(model)]
    learner = Trainer(trainer.accelerator, model, optimizers, lambda step: 1.0, clip_norm=0.5, context=trainer.context)
    critic, advantages = Critic(learner, settings.value_clip), StepAdvantages(settings.gamma, settings.gae_lambda)
    return rl(lm, trainer, micro_rows, critic=critic, step_advantages=advantages)


def with_teacher(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """As `rl`, the reference behind a prompt of its own; it follows the policy every second step."""
    told = TeacherPrompt("{question} {answer}", Numbers(), Instruction(), lm.block_size, lm.max_length)
    return rl(lm, trainer, micro_rows, algorithm("opsd", reference_every=2), teacher_prompt=told)


def corrected(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """As `rl`, where steps whose ratio to the sampler is off are left out."""
    correction = Correction(cap=1.5, floor=0.6, level="step", method="mask")
    return rl(lm, trainer, micro_rows, correction=correction)


def weighted(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """As `rl`, answers weighted by their ratios in their group."""
    return rl(lm, trainer, micro_rows, algorithm("stabledrl", clip_high=0.5), correction=Correction(cap=0.0), epochs=2)


def distilled(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """As `rl`, the reference a teacher."""
    return rl(lm, trainer, micro_rows, algorithm("opd"))


def rl(
    lm: DiffusionLM,
    trainer: Trainer,
    micro_rows: int | None,
    objective: Objective | None = None,
    correction: Correction | None = None,
    epochs: int = 1,
    **options: Any,
) -> list[dict[str, float]]:
    """Groups of 1 to 4 answers, sampled from a model that stays as it is, in two mini-batches a step."""
    still = small_lm(seed=1)
    still.model.to(trainer.accelerator.device)
    objective = objective or algorithm("dipo", beta=0.1)
    update = PolicyUpdate(
        trainer,
        objective,
        objective.estimator({}),
        lm,
        reference=LogprobModel(deepcopy(still.model).requires_grad_(False), context=trainer.context).to(still.device),
        old_from_sampler=False,
        correction=correction or Correction(cap=2.0),
        mini_batches=2,
        epochs=epochs,
        train_tail=True,
        row_tokens=96,
        micro_rows=micro_rows,
        longest=16,
        seed=0,
        **options,
    )
    decoding = Decoding(temperature=1.0, max_new_tokens=16, denoising_steps=3, stop_token_ids=tuple(range(2, 12)))
    found = []
    for step in range(STEPS):
        answers = NativeSampler(still).sample([numbers(step + i, 3 + 2 * i) for i in range(5)], 4, decoding)
        groups = [
            [
                Record(problem(i, one), k, "", one, reward=float(one.token_ids[0] % (k + 2)))
                for k, one in enumerate(group[: 1 + i % 4])
            ]
            for i, group in enumerate(answers)
        ]
        found.append(update.run(add_advantages(groups, update.advantages), step))
    return found


def problem(number: int, one: Trajectory) -> Problem:
    return Problem(f"{number}", " ".join(map(str, one.prompt_ids)), " ".join(map(str, range(20, 21 + number))))


def dpo(lm: DiffusionLM, trainer: Trainer, micro_rows: int | None) -> list[dict[str, float]]:
    """Pairs of answers that a model which stays as it is gave to five prompts, on their trace and by random masks."""
    still = small_lm(seed=1)
    still.model.to(trainer.accelerator.device)
    reference = LogprobModel(still.model.requires_grad_(False), context=trainer.context).to(still.device)
    decoding = Decoding(temperature=1.0, max_new_tokens=16, denoising_steps=3, stop_token_ids=tuple(range(2, 12)))
    answers = NativeSampler(still).sample([numbers(i, 3 + 2 * i) for i in range(5)], 2, decoding)
    pairs = [Pair(*group) for group in answers]
    preference = Preference("sigmoid", 0.1, label_smoothing=0.1, length_normalised=False, sft_weight=0.1)
    spec = BlockSpec(lm.block_size, MASK)
    found = []
    for step in range(STEPS):
        views = Trace() if step % 2 else BlockMasks(draws=2)
        rows = PairRows(views, spec, PAD, row_tokens=64, train_tail=True)(pairs, step)
        micro_batches = trainer.add_scores(trainer.cut(rows, micro_rows), reference, "ref_logprobs")
        found.append(trainer.step(micro_batches, preference.loss, len(pairs)))
    return found


TASKS = {
    "sft": sft,
    "certain": certain,
    "rl": rl,
    "critic": with_critic,
    "head": with_head,
    "teacher": with_teacher,
    "distilled": distilled,
    "corrected": corrected,
    "weighted": weighted,
    "dpo": dpo,
}


def take(
    task: str,
    launch: str = "auto",
    optimizer: str = "adamw",
    micro_rows: int | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    context: int = 1,
    peft: str = "none",
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What each step reports, and the parameters after the last."""
    accelerator = start_accelerator(device, dtype, launch)
    form = PEFT[peft]
    lm = on_device(form, accelerator)
    if checkpointing:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(lm.model, "aot_eager")
    optimizers = OPTIMIZERS[optimizer].build(lm.model)
    group = context_group(accelerator, context)
    model = LogprobModel(lm.model, context=group)
    trainer = Trainer(accelerator, model, optimizers, lambda step: 1.0, clip_norm=0.5, context=group)
    found = TASKS[task](lm, trainer, micro_rows)
    assert not compiled or counters["stats"]["unique_graphs"] > 0
    assert all(isinstance(one, DTensor) == (launch in SHARDED_LAUNCHES) for one in lm.model.parameters())
    copied = {name: tensor.detach().cpu().clone() for name, tensor in unsharded(form.pushed(lm))}
    sampler_lm = model_to_sample(lm, form)
    assert (sampler_lm.model.config is lm.model.config) == (sampler_lm is lm), "a copy is switched by itself"
    sampled_from = dict(sampler_lm.model.named_parameters())
    assert all(torch.equal(sampled_from[name].cpu(), copied[name]) for name in copied)
    narrow = dict(model_to_sample(lm, form, torch.bfloat16).model.named_parameters())
    assert all(torch.equal(narrow[name].cpu(), copied[name].to(narrow[name].dtype)) for name in copied)
    assert (narrow["lm_head.weight"].dtype == torch.bfloat16) == (launch in SHARDED_LAUNCHES)
    trained = {
        name: tensor.detach().cpu().clone() for name, tensor in unsharded(trainable_parameters(lm.model).items())
    }
    return found, copied | trained


def on_device(peft: Peft, accelerator: Accelerator) -> DiffusionLM:
    """The same model for every process, shared from the first on where processes share it."""

    def load() -> DiffusionLM:
        return peft.load(Small(), "float32", "cpu", "sdpa")

    if accelerator.is_fsdp2:
        return load_sharded(load, accelerator, "sdpa")
    lm = load()
    lm.model.to(accelerator.device)
    return lm


def among(
    processes: int, directory: Path, launch: str, tasks: str = "sft+rl+dpo+critic", **options: object
) -> list[dict]:
    """What `take` finds in each of so many processes of this machine, by task."""
    options_as_words = [f"{key}={value}" for key, value in options.items()]
    words = [[str(directory / str(rank)), launch, tasks, *options_as_words] for rank in range(processes)]
    run_together("tests.helpers.steps", words, seconds=120 * processes)
    return [
        {
            task: (
                json.loads(Path(f"{directory}/{rank}-{task}.json").read_text()),
                load_file(f"{directory}/{rank}-{task}"),
            )
            for task in tasks.split("+")
        }
        for rank in range(processes)
    ]


def differences(one: tuple, other: tuple) -> dict[str, float]:
    """The largest relative difference of each metric that is compared and, by its length, of a parameter.

    Of a metric near 0 as if it were 0.05: it is rounded as the terms that cancelled.
    """
    (steps, parameters), (other_steps, others) = one, other
    names = [name for name in COMPARED if name in steps[0]]
    found = {
        name: max(abs(a[name] - b[name]) / max(abs(a[name]), 0.05) for a, b in zip(steps, other_steps, strict=True))
        for name in names
    }
    apart = [float((value - others[name]).norm() / value.norm()) for name, value in parameters.items()]
    return found | {"parameters": max(apart)}


if __name__ == "__main__":
    file, launch, tasks, *words = sys.argv[1:]
    for task in tasks.split("+"):
        steps, parameters = take(task, launch, **OmegaConf.to_container(OmegaConf.from_dotlist(words)))
        Path(f"{file}-{task}.json").write_text(json.dumps(steps))
        save_file(parameters, f"{file}-{task}")
