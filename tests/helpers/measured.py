"""Models of any size and the most that they hold while they learn and sample, counted storage by storage."""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.models.load import DiffusionLM, diffusion_lm, pick_attention
from dirl_cli.models.peft import FullFinetune, Peft
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.plan.budget import Budget, Machine
from dirl_cli.plan.forecast import TrainingSetup, worst_case_trajectory
from dirl_cli.plan.rl_forecast import rl_budget
from dirl_cli.plan.sft_forecast import sft_budget
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.critic import Critic, LearnedCritic
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.update import PolicyUpdate, reference_model
from dirl_cli.rollout.engines import Native
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.storage import Record
from dirl_cli.sft.batches import Noise
from dirl_cli.sft.validation import cross_entropy
from dirl_cli.training.layers import Checkpointing, checkpoint_layers
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.optim import AdamW, Optim
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.trainer import Trainer
from dirl_cli.types import Decoding, Problem
from tests.helpers.algorithms import algorithm


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations return while it is entered: `now`, and the most so far.

    What a kernel takes for itself is not seen. On a CPU that is next to nothing: the profiler of torch's allocator
    tells the same bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_mkldnn:  # reordered weights have no storage of torch's
                self._count(tensor, torch.ops.mkldnn._nbytes(tensor))
            elif isinstance(tensor, Tensor) and tensor.untyped_storage().device.type != "meta":
                self._count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _count(self, holder: Any, size: int) -> None:
        if holder._cdata not in self.sizes:
            self.sizes[holder._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(holder, self._forget, holder._cdata)

    def _forget(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


@dataclass(frozen=True)
class Size:
    """Of a model with random weights."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    head_dim: int = 64
    tied: bool = False

    def build(self, device: str = "cpu") -> DiffusionLM:
        config = SDARConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_dim,
            intermediate_size=self.inner,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
        )
        config._attn_implementation = pick_attention("auto", device)
        torch.manual_seed(0)
        return diffusion_lm(SDARForCausalLM(config).eval().to(device), None, 4, self.vocabulary - 1)


ADAMW = AdamW(1e-3, (0.9, 0.95), 1e-8, 0.0)
PROBLEM = Problem("1", "", "")


def dipo(beta: float) -> Objective:
    return algorithm("dipo", beta=beta)


class Untrained:
    """No optimizer."""

    def build(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        return []


@dataclass(frozen=True)
class Trial:
    """What is asked of a model: demonstrations, or prompts and answers, all of one length."""

    size: Size
    dtype: str = "float32"
    device: str = "cpu"
    optim: Optim = ADAMW
    checkpointing: Checkpointing = False
    beta: float = 0.0
    critic: str = "none"
    top_p: float = 1.0
    tokens: int = 128
    prompt: int = 21
    row_tokens: int = 256
    micro_rows: int = 1
    peft: Peft = FullFinetune()
    products: str = "auto"

    @property
    def machine(self) -> Machine:
        return Machine(self.device, self.dtype, "auto", 1, None)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "launch": "auto",
            "steps": 1,
            "rl.epochs": 1,
            "micro_rows": self.micro_rows,
            "gradient_checkpointing": self.checkpointing,
            "row_tokens": self.row_tokens,
            "decoding.max_new_tokens": self.tokens,
            "batch_size": 4,
            "max_tokens": self.tokens,
            "eval_problems": 0,
            "rollout.max_batch": 8,
            "rl.problems": 2,
            "rl.group_size": 4,
            "rl.mini_batches": 1,
            "rollout.products": self.products,
            "rollout.cache_share": 0.8,
            "rl.async_rollout": False,
        }

    def trainer(self, lm: DiffusionLM, decoding: Decoding | None = None) -> Trainer:
        checkpoint_layers(lm.model, self.checkpointing)
        scorer = LogprobModel(lm.model, lm.unsampled_ids if decoding else (), decoding)
        accelerator = start_accelerator(self.device, self.dtype)
        return Trainer(accelerator, scorer, self.optim.build(lm.model), lambda step: 1.0, 1.0)

    def fine_tune(self, lm: DiffusionLM) -> Budget:
        """Two steps on four demonstrations; returns what was to be expected."""
        masking = PerBlock()
        trainer = self.trainer(lm)
        noise = Noise(masking, lm.block_size, lm.mask_token_id, lm.pad_token_id, self.row_tokens)
        demonstration = example([1] * self.tokens, [True] * self.tokens, lm.block_size, lm.pad_token_id)
        for step in range(2):
            rows, answer_tokens = noise.rows([demonstration] * 4, step)
            trainer.step(trainer.cut(rows, self.micro_rows), cross_entropy, answer_tokens)
        setup = TrainingSetup(lm, self.optim, self.machine, self.settings, self.peft)
        return sft_budget(setup, masking, Decoding(), np.array([self.tokens]), [])

    def reinforce(self, lm: DiffusionLM) -> Budget:
        """Two updates on two groups of four answers, as the slowest decoding gives them."""
        objective = dipo(self.beta)
        decoding = Decoding(temperature=1.0, top_p=self.top_p, max_new_tokens=self.tokens)
        trainer = self.trainer(lm, decoding)
        reference = reference_model(self.peft.reference(lm), decoding) if self.beta else None
        critic = None
        if self.critic != "none":
            settings = LearnedCritic(self.critic == "model", 1.0, 1.0, 0.2, 1e-3, (0.9, 0.95), 1e-8, 0.0)
            model = settings.model(lm)
            optimizers = [settings.optimizer(model)]
            critic = Critic(Trainer(trainer.accelerator, model, optimizers, lambda step: 1.0, 1.0), 0.2)
        update = PolicyUpdate(
            trainer,
            objective,
            objective.estimator({}),
            lm,
            reference=reference,
            old_from_sampler=True,
            correction=Correction(cap=0.0),
            mini_batches=1,
            epochs=1,
            train_tail=True,
            row_tokens=self.row_tokens,
            micro_rows=self.micro_rows,
            longest=self.tokens,
            seed=0,
            critic=critic,
        )
        answer = worst_case_trajectory(self.prompt, self.tokens, decoding.denoising_steps, lm.block_size)
        answer = replace(answer, logprobs=[-1.0] * len(answer.token_ids))
        for step in range(2):
            group = [Record(PROBLEM, i, "", answer, advantage=i - 1.5) for i in range(4)]
            update.run([group, group], step)
        setup = TrainingSetup(lm, self.optim, self.machine, self.settings, self.peft)
        return rl_budget(setup, objective, decoding, self.prompt, None, learns=True, critic=self.critic)

    def sample(self, lm: DiffusionLM) -> Budget:
        """Eight answers at once, with a model that has not learned yet."""
        decoding = Decoding(temperature=1.0, top_p=self.top_p, max_new_tokens=self.tokens)
        with start_accelerator(self.device, self.dtype).autocast():
            NativeSampler(lm, 8, products=self.products).sample([[1] * self.prompt] * 8, 1, decoding)
        setup = TrainingSetup(lm, Untrained(), self.machine, self.settings)
        return rl_budget(setup, dipo(0.0), decoding, self.prompt, Native(8, self.products, 0.8, False), learns=False)


def measured(trial: Trial, work: str) -> tuple[int, int]:
    """Bytes at the peak of a trial's `work` (fine_tune, reinforce or sample): as counted, and as planned."""
    with Live() if trial.device == "cpu" else nullcontext() as live:
        lm = trial.size.build(trial.device)
        lm.model.to(trial.peft.base_dtype(trial.dtype, trial.device))
        trial.peft.adapt(lm.model)
        if live:
            live.peak = live.now
        else:
            torch.cuda.reset_peak_memory_stats()
        budget = getattr(trial, work)(lm)
    return live.peak if live else torch.cuda.max_memory_allocated(), budget.need({})
