"""A checkpoint of a training run as a model: to be asked, or to learn on from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from dirl_cli.errors import DirlError
from dirl_cli.models.adapter import merge_adapter
from dirl_cli.models.load import DiffusionLM, pick_device, pick_dtype
from dirl_cli.models.peft import trainable_parameters
from dirl_cli.training.shards import read_shards
from dirl_cli.training.stored_checkpoint import MODEL, checkpoint_files


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run as one of its checkpoints has it, whole or in shards.

    path: of the checkpoint. base, peft: the settings of the run, with which it put its model together: configuration
    and tokenizer are those of the base, and so are weights that were not trained. adapter: what to merge into it, such
    as a later run left beside it.
    """

    name: str
    path: str
    base: Any  # models.peft.ModelSource
    peft: Any  # models.peft.Peft
    adapter: str | None = None

    def load(self, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> DiffusionLM:
        """Load the base as any model, then what was trained of it; an adapter is merged."""
        if device == "meta":  # its shapes alone, which training does not change
            return self.base.load(dtype, device, attention)
        device = pick_device(device)
        lm: DiffusionLM = self.peft.load(self.base, dtype, device, attention)
        try:
            read_shards(checkpoint_files(Path(self.path), MODEL), trainable_parameters(lm.model))
        except (SafetensorError, OSError) as error:
            raise DirlError(f"{self.path} cannot be read ({error}): give another checkpoint of the run") from error

        # As any other model from here on: no adapter of its own, in the dtype that was asked for, free to be trained.
        lm = self.peft.merged(lm)
        nn.Module.to(lm.model, dtype=pick_dtype(dtype, device))
        if self.adapter:
            lm = replace(lm, model=merge_adapter(lm.model, self.adapter))
        lm.model.requires_grad_(True).eval()
        return lm
