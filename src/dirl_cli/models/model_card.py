"""The model card: what a saved model comes from, how it was made, how good it was and how it is used."""

import re
from collections.abc import Iterator, Mapping, Sequence
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
IN_PLACE, AT_THE_NEXT = "at that position: they are not shifted.", "at the next one, as in a causal model."
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
    """The README.md of a model, as Markdown with a YAML header.

    repository: its name on the Hub; without one it is loaded from the card's own directory. summary: how it came about,
    in a sentence. base: the path or Hub name of the model it began as. recipe, decoding: settings by name.
    metrics: the values of each in the course of training. config: the model's.
    """
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=list(dict.fromkeys(repositories(recipe.get("data")))) or None,
        **inherited(base) if base else {},
    )
    measured = [[key, values[-1], min(values), max(values)] for key, values in metrics.items() if values]
    sections = {
        f"# {title}": summary,
        "## Recipe": markdown_table(["", ""], [*recipe.items()]),
        "## Metrics": markdown_table(["", "last", "lowest", "highest"], measured) if measured else "",
        "## Decoding": markdown_table(["", ""], [*decoding.items()]) if decoding else "",
        "## Use": usage(repository or ".", config),
        "## Versions": ", ".join(f"{package} {installed(package) or 'of a checkout'}" for package in PACKAGES),
    }
    body = "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text)
    return f"---\n{header.to_yaml()}\n---\n\n{body}\n"


def usage(name: str, config: PreTrainedConfig) -> str:
    """How a model is used, which its name and configuration tell."""
    elsewhere = REGISTERED.get(config.model_type)
    return USE.format(
        name=name,
        registering="import dirl_cli.models.sdar  # registers the model type\n" if elsewhere else "",
        aligned=AT_THE_NEXT if getattr(config, "logit_shift", False) else IN_PLACE,
        elsewhere=f" Where dirl is not installed, `{elsewhere}` loads\nthe same weights." if elsewhere else "",
    )


def adapter_card(title: str, summary: str, model: Mapping[str, Any] | None, recipe: Mapping[str, object]) -> str:
    """The README.md of an adapter. model: the settings of the one that it stands beside, if that has a path."""
    base = model["path"] if model else None
    header = ModelCardData(library_name="peft", tags=TAGS, **inherited(base) if base else {})
    command = f"dirl eval {command_words(model) if model else 'model=BASE'} model.adapter=."
    sections = f"## Recipe\n\n{markdown_table(['', ''], [*recipe.items()])}\n\n## Use\n\n```bash\n{command}\n```"
    body = f"# {title}, adapter\n\n{summary}\n\n{sections}"
    return f"---\n{header.to_yaml()}\n---\n\n{body}\n"


def command_words(model: Mapping[str, Any]) -> str:
    """The words by which a command loads the model of these settings as they do."""
    choice = "from_causal model.path=" if "logit_shift" in model else ""
    others = {key: model.get(key) for key in ("block_size", "mask_token_id", "logit_shift")}
    rest = [f" model.{key}={value}" for key, value in others.items() if value is not None]
    return f"model={choice}{format_setting(model['path'])}{''.join(rest)}"


def inherited(base: str) -> dict[str, Any]:
    """The base model's Hub name and licence, as far as its own card tells."""
    is_repository = list(repositories(base)) == [base]
    try:
        file = try_to_load_from_cache(base, "README.md") if is_repository else Path(base, "README.md")
        known = metadata_load(file) if isinstance(file, str | Path) and Path(file).is_file() else None
    except (ValueError, YAMLError):  # a broken card is no reason to fail
        known = None
    kept = {key: value for key, value in (known or {}).items() if key in INHERITED}
    return {**kept, "base_model": base} if is_repository else kept


def repositories(settings: object) -> Iterator[str]:
    """The Hub names among the values of nested settings: OWNER/NAME where there is no such file or directory."""
    if isinstance(settings, Mapping | list):
        for value in settings.values() if isinstance(settings, Mapping) else settings:
            yield from repositories(value)
    elif isinstance(settings, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", settings) and not Path(settings).exists():
        yield settings


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[" ".join(format_setting(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *cells])


def format_setting(value: object) -> str:
    """A setting as a reader wants it: `AdamW(lr=1e-05, weight_decay=0.0)`; of an absolute path the last name only."""
    if isinstance(value, Mapping):
        kind = str(value.get("_target_", "")).rpartition(".")[2]
        given = {key: inner for key, inner in value.items() if key != "_target_" and inner is not None}
        inner = ", ".join(f"{key}={format_setting(inner)}" for key, inner in given.items())
        return f"{kind}({inner})" if kind and inner else kind or inner
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_setting, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).name if isinstance(value, str) and value.startswith("/") else str(value)
