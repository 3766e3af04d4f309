"""The model card: what a saved model comes from, how it was made, how good it was and how it is used."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from transformers import PreTrainedConfig
from yaml import YAMLError

from dirl_cli.files import installed

TAGS = ["block-diffusion", "dirl"]
INHERITED = ("base_model", "license", "license_name", "license_link")  # of a base model's card
PACKAGES = ("dirl", "torch", "transformers")
USE = """```bash
dirl generate model={name} prompt="What is 7 times 8?"
```

```python
{registering}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```

Inside a block the model looks both ways, and at all blocks before it. The logits at a position are those of the token
{aligned}{elsewhere}"""
IN_PLACE = "at that position: they are not shifted."
AT_THE_NEXT = "at the next one, as in a causal model."
REGISTERED = {  # model types of our own, and the class of transformers that has the same weights
    "sdar": "Qwen3ForCausalLM",
    "sdar_moe": "Qwen3MoeForCausalLM",
}


def model_card(
    title: str,
    repository: str | None,
    summary: str,
    base: str | None,
    recipe: Mapping[str, object],
    metrics: Mapping[str, Sequence[float]],
    decoding: Mapping[str, object],
    config: PreTrainedConfig,
) -> str:
    """Write the README.md of a model, as Markdown with a YAML header.

    repository: its name on the Hub; without one it is loaded from the card's own directory. summary: how it came about,
    in a sentence. base: the path or Hub name of the model it began as. recipe, decoding: settings by name.
    metrics: the values of each in the course of training. config: the model's.
    """
    # The data sets are names of the Hub alone: a card says nothing of files on its author's disk.
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=list(dict.fromkeys(repositories(recipe.get("data")))) or None,
        **inherited(base),
    )
    sections = {f"# {title}": summary, "## Recipe": markdown_table(["", ""], [*recipe.items()])}
    measured = [[key, values[-1], min(values), max(values)] for key, values in metrics.items() if values]
    if measured:
        sections["## Metrics"] = markdown_table(["", "last", "lowest", "highest"], measured)
    if decoding:
        sections["## Decoding"] = markdown_table(["", ""], [*decoding.items()])
    sections["## Use"] = usage(repository or ".", config)
    versions = [f"{package} {installed(package) or 'of a checkout'}" for package in PACKAGES]
    sections["## Versions"] = ", ".join(versions)
    body = "\n\n".join(f"{heading}\n\n{text}" for heading, text in sections.items() if text)
    return f"---\n{header.to_yaml()}\n---\n\n{body}\n"


def usage(name: str, config: PreTrainedConfig) -> str:
    """How a model is used. name: on the Hub, or its directory. config: tells its type and where logits stand."""
    registering = ""
    elsewhere = ""
    if counterpart := REGISTERED.get(config.model_type):
        registering = "import dirl_cli.models.sdar  # registers the model type\n"
        elsewhere = f" Where dirl is not installed, `{counterpart}` loads\nthe same weights."
    aligned = AT_THE_NEXT if getattr(config, "logit_shift", False) else IN_PLACE
    return USE.format(name=name, registering=registering, aligned=aligned, elsewhere=elsewhere)


def adapter_card(title: str, summary: str, model: Mapping[str, Any] | None, recipe: Mapping[str, object]) -> str:
    """Write the README.md of an adapter. model: the settings of the one that it stands beside, if that has a path."""
    base = None
    words = "model=BASE"
    if model:
        base = model["path"]
        words = command_words(model)
    header = ModelCardData(library_name="peft", tags=TAGS, **inherited(base))
    command = f"dirl eval {words} model.adapter=."
    sections = f"## Recipe\n\n{markdown_table(['', ''], [*recipe.items()])}\n\n## Use\n\n```bash\n{command}\n```"
    body = f"# {title}, adapter\n\n{summary}\n\n{sections}"
    return f"---\n{header.to_yaml()}\n---\n\n{body}\n"


def command_words(model: Mapping[str, Any]) -> str:
    """The words by which a command loads the model of these settings as they do."""
    choice = "from_causal model.path=" if "logit_shift" in model else ""
    words = [f"model={choice}{format_setting(model['path'])}"]
    for key in ("block_size", "mask_token_id", "logit_shift"):
        if model.get(key) is not None:
            words.append(f"model.{key}={model[key]}")
    return " ".join(words)


def inherited(base: str | None) -> dict[str, Any]:
    """The base model's Hub name and licence, as far as its own card tells. base: a path, a Hub name, or None."""
    if not base:
        return {}
    # A licence goes on with what is made of a model; the base's own card is where it stands.
    is_repository = list(repositories(base)) == [base]
    metadata = None
    with suppress(ValueError, YAMLError):  # a broken card is no reason to fail
        file: Any = Path(base, "README.md")
        if is_repository:
            file = try_to_load_from_cache(base, "README.md")  # without asking the Hub, which may be out of reach
        if isinstance(file, str | Path) and Path(file).is_file():
            metadata = metadata_load(file)
    settings = {key: value for key, value in (metadata or {}).items() if key in INHERITED}
    if is_repository:
        settings["base_model"] = base
    return settings


def repositories(settings: object) -> Iterator[str]:
    """The Hub names among the values of nested settings: OWNER/NAME where there is no such file or directory."""
    if isinstance(settings, Mapping):
        for value in settings.values():
            yield from repositories(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from repositories(value)
    elif isinstance(settings, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", settings) and not Path(settings).exists():
        yield settings


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a table of Markdown, each cell on one line."""
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [format_setting(cell).replace("|", "\\|") for cell in row]
        lines.append([" ".join(cell.split()) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_setting(value: object) -> str:
    """A setting as a reader wants it: `AdamW(lr=1e-05, weight_decay=0.0)`; of an absolute path the last name only."""
    if isinstance(value, Mapping):
        kind = str(value.get("_target_", "")).rpartition(".")[2]
        settings = {key: inner for key, inner in value.items() if key != "_target_" and inner is not None}
        inside = ", ".join(f"{key}={format_setting(inner)}" for key, inner in settings.items())
        if kind and inside:
            return f"{kind}({inside})"
        return kind or inside
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_setting, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    return str(value)
