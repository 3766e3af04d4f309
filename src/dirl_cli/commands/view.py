"""`dirl view`: answers of a rollout, an evaluation or `dirl generate` as one HTML file, or one of them as a picture."""

import json
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.filesize import decimal
from yaml import YAMLError

from dirl_cli.cli.build import build, build_settings
from dirl_cli.console import PlainConsole, working
from dirl_cli.errors import DirlError
from dirl_cli.files import write_bytes, write_text
from dirl_cli.text import counted, shell_word
from dirl_cli.viewer.answer_sources import AnswerSource, read_source
from dirl_cli.viewer.html_page import page
from dirl_cli.viewer.payload import TokenReader, payload
from dirl_cli.viewer.picture import gif, svg

SAVED = "dirl_cli.models.load.SavedModel"
NOTES = ("sampled_from.json", "config.yaml")  # which name a model: of `dirl generate`, of a run


def run(cfg: DictConfig, out: Path | None) -> None:
    """Write the page of cfg.answers to `cfg.to`, or with cfg.export the picture of the answer cfg.number."""
    if not cfg.answers:
        raise DirlError("say whose answers, such as `dirl view runs/rl/tiny-arithmetic-dipo`")
    console = PlainConsole(soft_wrap=True)
    with working(console, "reading the answers"):
        sources = [read_source(Path(path), cfg.limit) for path in cfg.answers]
        readers = [token_reader(cfg, source) for source in sources]

    data = payload(sources, readers, command_line(cfg))
    if cfg.export:
        export(data, cfg.number, Path(cfg.export))
        console.print(f"answer {cfg.number} in {cfg.export}")
        return
    content = page(data)
    to = Path(cfg.to)
    write_text(to, content, "give another file with to=FILE")
    total = sum(len(source.answers) for source in sources)
    console.print(f"{counted(total, 'answer')} in {to} ({decimal(len(content))}): open it in a browser")
    for source in sources:
        if source.left_out:
            console.print(f"{source.left_out:,} more answers of {source.path} are left out: raise limit={cfg.limit}")


def command_line(cfg: DictConfig) -> str:
    """The command that makes this page, as it is typed in a shell."""
    words = [shlex.quote(path) for path in cfg.answers]
    if cfg.model:
        words.append(shell_word("model", cfg.model.path))
    return " ".join(["dirl view", *words, f"limit={cfg.limit}"])


def export(data: dict[str, Any], number: int, file: Path) -> None:
    """Write the picture of an answer. number: from 1, as the page counts. Raises DirlError where there can be none."""
    answers = data["answers"]
    if number > len(answers):
        raise DirlError(f"number={number}: there are {counted(len(answers), 'answer')}, so give one of these")
    answer = answers[number - 1]
    if "tokens" not in answer:
        raise DirlError("an evaluation keeps no tokens, so there is nothing to draw: give answers of `dirl generate`")
    remedy = "give another file with export=FILE"
    if file.suffix == ".svg":
        write_text(file, svg(answer, data["texts"]), remedy)
    elif file.suffix == ".gif":
        write_bytes(file, gif(answer, data["texts"]), remedy)
    else:
        raise DirlError(f"export={file}: give a name that ends in .gif or .svg")


def token_reader(cfg: DictConfig, source: AnswerSource) -> TokenReader:
    """What reads the tokens of a source: the tokenizer of cfg.model, or that of the model its run names.

    Raises DirlError where there are tokens and no tokenizer is to be had.
    """
    if source.kind == "evaluation":
        return TokenReader(None)
    model = build(cfg.model) if cfg.model else named_model(source.path)
    if model is None:
        raise DirlError(f"nothing beside {source.path} says which model it is of: give it with model=DIR")
    try:
        lm = model.load("auto", "meta")
    except DirlError as error:
        if cfg.model:
            raise
        raise DirlError(
            f"the model that {source.path} is of cannot be read ({error}): give it with model=DIR"
        ) from error
    return TokenReader(lm.tokenizer, lm.block_size)


def named_model(path: Path) -> Any:
    """The model of the run that answers are in: the one it ended with, or the one that it names; None without either.

    path: the run's directory, its rollouts/, or a file.
    """
    for directory in [path, *path.resolve().parents][:3]:
        if (directory / "model" / "config.json").is_file():
            return build_settings("model", {"_target_": SAVED, "name": "", "path": str(directory / "model")})
        for name in NOTES:
            settings = read_note(directory / name)
            if "model" in settings:
                return build_settings("model", settings["model"])
    return None


def read_note(file: Path) -> dict[str, Any]:
    """What a file notes; nothing where it is not there. Raises DirlError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
        else:
            content = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        raise DirlError(f"{file}, which names the model, cannot be read: give the model with model=DIR") from error
    return content if isinstance(content, dict) else {}
