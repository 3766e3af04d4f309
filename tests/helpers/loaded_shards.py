"""Models as one process among several loads them, and how they compare with the whole ones.

python -m tests.helpers.loaded_shards KIND,DIRECTORY[,ADAPTER] …  # RANK, WORLD_SIZE, … as torchrun has them; JSON
"""

import json
import sys
from dataclasses import replace
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, SavedModel, fingerprint
from dirl_cli.models.peft import FullFinetune, LoraFinetune, Peft
from dirl_cli.models.sharded_tensors import unsharded
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.sharded_model import load_sharded, reference_copy

LORA = LoraFinetune(("q_proj", "o_proj"), rank=2, alpha=4, dropout=0.0, four_bit=False, seed=0)
PEFT: dict[str, Peft] = {
    "full": FullFinetune(),
    "lora": LORA,
    "qlora": replace(LORA, four_bit=True),
}


def report(kind: str, directory: str, adapter: str | None = None) -> dict[str, object]:
    """What is equal to the whole model."""
    accelerator = start_accelerator("cpu", "float32" if kind == "full" else "bfloat16", "fsdp2")
    peft = PEFT[kind]
    load = partial(peft.load, SavedModel("model", directory, adapter=adapter), "bfloat16", "cpu", "sdpa")
    try:
        lm = load_sharded(load, accelerator, "sdpa")
    except DirlError as error:
        return {"error": str(error)}

    whole = load()
    expected = dict(whole.model.named_parameters())
    layers = {name for name, one in lm.model.named_parameters() if isinstance(one, DTensor)}
    copied = reference_copy(lm, peft)
    return {
        "names": list(dict(lm.model.named_parameters())) == list(expected),
        "weights": same(dict(unsharded(lm.model.named_parameters())), expected),
        "buffers": same(dict(lm.model.named_buffers()), dict(whole.model.named_buffers())),
        "trained": [one.requires_grad for one in lm.model.parameters()] == [o.requires_grad for o in expected.values()],
        "tied": is_tied(lm) == is_tied(whole) == is_tied(copied),
        "settings": lm.model.config.to_dict() == whole.model.config.to_dict(),
        "fingerprint": fingerprint(lm.model) == fingerprint(whole.model),
        "reference": same(dict(unsharded(copied.model.named_parameters())), dict(peft.pushed(whole))),
        "sharded": layers == {name for name in expected if ".layers." in name},
    }


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal to the bit, dtypes too."""
    return some.keys() == others.keys() and all(
        some[name].dtype == others[name].dtype and torch.equal(bits(some[name]), bits(others[name])) for name in some
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is stored: weights that are packed are no numbers that equal themselves."""
    return tensor.detach().view(torch.uint8)


def is_tied(lm: DiffusionLM) -> bool:
    return lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight


if __name__ == "__main__":
    print(json.dumps([report(*words.split(",")) for words in sys.argv[1:]]))
