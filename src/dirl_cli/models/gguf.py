"""An ordinary checkpoint out of a GGUF file that an installed package brings along."""

from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dirl_cli.errors import DirlError
from dirl_cli.models.published import save_published


def unpack(package: str, file: str, directory: Path, remedy: str) -> None:
    """Write the model in `file` of an installed package into a directory, in float32 and with its tokenizer.

    remedy: what installs the package. Raises DirlError where it is missing.
    """
    source = find(package, file)
    if source is None or find_spec("gguf") is None:
        raise DirlError(f"the model comes in the package {package}, which is not installed: {remedy}")
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del loaded.config.quantization_config  # of what it was; as it is, it would refuse to be saved
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    for name in ("bos", "eos", "pad"):  # transformers mixes up the first two
        token = fields[f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id"].contents()
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
        setattr(model.config, f"{name}_token_id", token)
        setattr(model.generation_config, f"{name}_token_id", token)
    save_published(directory, model, tokenizer)


def find(package: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported: it may want what is not there."""
    try:
        found = [one.locate() for one in files(package) or () if str(one) == file]
    except PackageNotFoundError:
        return None
    return Path(str(found[0])) if found else None
