"""`dirl view`: answers of a rollout, an evaluation or `dirl generate` as one HTML file, or one of them as a picture."""

import json
import secrets
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.filesize import decimal
from yaml import YAMLError

from dirl_cli.cli.build import build, build_settings
from dirl_cli.console import PlainConsole, working
from dirl_cli.errors import DirlError, pip_install
from dirl_cli.files import conf_dir, write_bytes, write_text
from dirl_cli.text import counted, shell_word
from dirl_cli.viewer.answer_sources import REMEDY, Kind, files_by_step, kind_of, read_source, source_name
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
    require_used(cfg)
    if cfg.serve:
        serve(cfg, console)
        return
    with working(console, "reading the answers"):
        sources = [read_source(Path(path), cfg.limit) for path in cfg.answers]
        readers = [token_reader(cfg, source.path, source.kind) for source in sources]

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
            more = f"{source.left_out:,} more answers of {source.path} are left out"
            console.print(f"{more}: raise limit={cfg.limit}, or give serve=true")


def require_used(cfg: DictConfig) -> None:
    """Raises DirlError for a setting of the page in a file where it is served, or the other way round."""
    defaults = OmegaConf.load(conf_dir() / "view.yaml")
    if cfg.serve and cfg.limit != defaults.limit:
        raise DirlError("limit= leaves answers out of a file and serve=true shows all: leave one of them out")
    if not cfg.serve and cfg.port != defaults.port:
        raise DirlError(f"port={cfg.port} is of an address, and a file has none: give serve=true, or leave port out")


def serve(cfg: DictConfig, console: PlainConsole) -> None:
    """Serve the page of all of cfg.answers to this machine until Ctrl-C."""
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing:
        raise DirlError(f"serve=true wants {' and '.join(missing)}: {pip_install('serve')}")
    if cfg.export:
        raise DirlError("export= draws a picture and serve=true shows a page: leave one of them out")
    from dirl_cli.viewer.page_server import listener_on, page_app, serve_page  # which import what is optional
    from dirl_cli.viewer.served_answers import AnswerFile, ServedAnswers

    listener = listener_on(cfg.port)  # one that is taken is told before the answers take their time to be read
    files = []
    readers = []
    with working(console, "reading the answers"):
        for source, path in enumerate(map(Path, cfg.answers)):
            steps = files_by_step(path)
            kind = kind_of(next(iter(steps.values())))
            readers.append(token_reader(cfg, path, kind))
            files += [AnswerFile(source, file, kind, step) for step, file in steps.items()]
        answers = ServedAnswers(files, readers, lambda file, number: picture_command(cfg, file, number))
        if not len(answers):
            raise DirlError(f"{cfg.answers[0]} holds no answers yet: {REMEDY}")

    key = secrets.token_urlsafe(12)
    head = answers.head([source_name(Path(path)) for path in cfg.answers])
    app = page_app(page(head, is_served=True), answers, key)
    host, port = listener.getsockname()
    console.print(f"{counted(len(answers), 'answer')} at http://{host}:{port}/{key}/ until Ctrl-C")
    serve_page(listener, app)


def picture_command(cfg: DictConfig, file: Path, number: int) -> str:
    """The command that draws an answer, by its number in its file, but for the picture's name."""
    words = [shlex.quote(str(file))]
    if cfg.model:
        words.append(shell_word("model", cfg.model.path))
    return " ".join(["dirl view", *words, f"limit={number} number={number}"])


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


def token_reader(cfg: DictConfig, path: Path, kind: Kind) -> TokenReader:
    """What reads the tokens of answers: the tokenizer of cfg.model, or that of the model their run names.

    Raises DirlError where there are tokens and no tokenizer is to be had.
    """
    if kind == "evaluation":
        return TokenReader(None)
    model = build(cfg.model) if cfg.model else named_model(path)
    if model is None:
        raise DirlError(f"nothing beside {path} says which model it is of: give it with model=DIR")
    try:
        lm = model.load("auto", "meta")
    except DirlError as error:
        if cfg.model:
            raise
        raise DirlError(f"the model that {path} is of cannot be read ({error}): give it with model=DIR") from error
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
