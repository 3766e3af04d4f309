"""`dirl merge`: a LoRA adapter becomes part of the weights."""

from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from dirl_cli.cli.build import build
from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, pick_dtype
from dirl_cli.models.model_card import model_card
from dirl_cli.models.save import push, require_pushable
from dirl_cli.text import shell_word


def run(cfg: DictConfig, out: Path | None) -> None:
    """Write cfg.model with its adapter merged into it to the new directory `cfg.to`."""
    to = Path(cfg.to)
    adapter = cfg.model.get("adapter")
    if adapter is None:
        raise DirlError("there is nothing to merge: give an adapter with model.adapter=DIR")
    if to.exists():
        raise DirlError(f"{to} exists: give a new directory with to=…")
    require_pushable(cfg.push_to_hub)

    # Merged in float32, whatever is saved: adapter and weights are added before they are rounded.
    lm: DiffusionLM = build(cfg.model).load("float32", "cpu")
    nn.Module.to(lm.model, dtype=pick_dtype(cfg.dtype, "cpu"))

    recipe = {"model": cfg.model.path, "adapter": adapter, "dtype": cfg.dtype}
    decoding = {"block_size": lm.block_size, "mask_token_id": lm.mask_token_id}
    summary = f"{cfg.model.name} with a LoRA adapter that `dirl merge` made part of its weights."
    lm.save(to, model_card(to.name, cfg.push_to_hub, summary, cfg.model.path, recipe, {}, decoding, lm.model.config))
    print(f"the merged model is in {to}: run `dirl eval {shell_word('model', to)}`")
    if cfg.push_to_hub:
        print(f"and at {push(to, cfg.push_to_hub)}")
