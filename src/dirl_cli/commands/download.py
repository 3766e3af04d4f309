"""`dirl download`: fetch from the Hub, into its cache or a directory, what is not there yet of models and data sets."""

import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import httpx
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from omegaconf import DictConfig
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dirl_cli import hub
from dirl_cli.console import PlainConsole
from dirl_cli.errors import DirlError
from dirl_cli.hub import File, Repository

KINDS: dict[str, hub.Kind] = {"model": "model", "data": "dataset", "bench": "dataset"}
AT_ONCE = 8  # files
GO_ON = "then the same command goes on from what is here"
REFUSALS = {
    401: "the Hub does not know your token: `hf auth login` with another, or correct HF_TOKEN",
    403: "your token may not read it: `hf auth login` with one that may",
    429: f"the Hub takes no more requests for now: wait some minutes or `hf auth login`, {GO_ON}",
}
TROUBLE = f"the Hub has trouble: try again later, {GO_ON}"


def run(cfg: DictConfig, out: Path | None) -> None:
    """Download what `cfg` names into `cfg.to`, or into the Hub's cache; print where it is and what to do with it."""
    disable_progress_bars()
    hub_logging.set_verbosity_error()  # its retries show as a pause, and the last failure is told
    console = PlainConsole(file=sys.stdout, soft_wrap=True)
    to = Path(cfg.to) if cfg.to else None
    asked = list(dict.fromkeys(requested_repositories(cfg)))  # each once
    if packaged := cfg.model is not None and cfg.model.get("package"):
        convert_packaged_model(cfg, console)
    if not asked:
        if packaged:
            return
        raise DirlError("name what to download, such as model=sdar8b, bench=all, data=bigmath or OWNER/NAME")
    repositories, missing = [], 0
    for kind, repo_id in asked:
        if not to and Path(repo_id).exists():
            raise DirlError(f"{repo_id} is here, and commands read it: there is nothing to download")
        with explain_hub_errors(repo_id, kind):
            repository = require_loadable(
                hub.inspect_repository(repo_id, kind, to / repo_id if to and len(asked) > 1 else to)
            )
        console.print(format_repository(repository))
        if cfg.dry_run:
            console.print(*map(format_file, repository.files), sep="\n")
        repositories.append(repository)
        missing += sum(file.size - file.bytes_here for file in repository.files)
    console.print(room_for(missing, to or Path(constants.HF_HUB_CACHE)))
    if cfg.dry_run:
        return
    for repository in repositories:
        with explain_hub_errors(repository.id, repository.kind):
            fetch_all([file for file in repository.files if file.sha256 and not file.is_here], console)
            hub.snapshot(repository.id, repository.kind, repository.to)
        console.print(f"{repository.id} is in {repository.directory}")
    console.print(*(f"Next: {command}" for command in next_commands(repositories)), sep="\n")


def convert_packaged_model(cfg: DictConfig, console: PlainConsole) -> None:
    """Make the model that an installed package brings, where it is not there yet."""
    from dirl_cli.models.from_causal import convert_gguf

    directory = Path(cfg.to or cfg.model.path)
    if not cfg.dry_run and not (directory / "config.json").exists():
        convert_gguf(cfg.model.package, cfg.model.file, directory)
    state = "is to be in" if cfg.dry_run else "is in"
    console.print(f"{cfg.model.name} {state} {directory}")
    # What it can do at once, a token at a time; to learn blocks, it wants data and a recipe (docs/smollm2.md).
    place = f" model.path={directory}" if cfg.to else ""
    as_it_is = f"model={cfg.model.name}{place} model.block_size=1 decoding=sequential"
    console.print(f"Next: dirl generate {as_it_is} prompt='What is the capital of France?'")


def requested_repositories(cfg: DictConfig) -> Iterator[tuple[hub.Kind, str]]:
    """The kind and the id of each repository that is asked for."""
    choices = hub.configured_repositories()
    for group in filter(cfg.get, KINDS):
        choice = cfg[group]
        if choice.get("package"):
            continue  # it comes from a package
        if "each" in choice:  # of bench=all
            words = (f"{group}={name}" for name in choice.each)
            yield from ((KINDS[group], choices[word]) for word in words if word in choices)
        elif "path" in choice:
            yield KINDS[group], choice.path
        else:
            raise DirlError(f"{group}={choice.name} names no repository of the Hub: there is nothing to download")
    for word in cfg.ids:
        repo_id = word.removeprefix(f"{constants.ENDPOINT}/")
        if near := [choice for choice in choices if choice.endswith(f"={repo_id}")]:
            raise DirlError(f"{repo_id}: did you mean {' or '.join(near)}?")
        yield "dataset" if repo_id.startswith("datasets/") else "model", repo_id.removeprefix("datasets/")


def require_loadable(repository: Repository) -> Repository:
    """The repository, if it holds what can be loaded."""
    suffixes = {Path(file.name).suffix for file in repository.files}
    if repository.kind == "model" and ".safetensors" not in suffixes:
        raise DirlError(
            f"{repository.id} has no weights in safetensors, the one format that is loaded here: take a repository that"
            " has, or load it elsewhere and save it with save_pretrained"
        )
    if not suffixes & {".safetensors", ".json", ".jsonl", ".gz", ".parquet"}:
        raise DirlError(f"{repository.id} holds no JSON, JSONL or Parquet file: take another data set")
    return repository


def format_repository(repository: Repository) -> str:
    """Such as: OWNER/NAME: 12 files, 16.4 GB, 3.2 GB of it here."""
    total, here = sum(file.size for file in repository.files), sum(file.bytes_here for file in repository.files)
    state = "all here" if here == total else f"{decimal(here)} of it here" if here else "none of it here"
    return f"{repository.id}: {len(repository.files)} files, {decimal(total)}, {state}"


def format_file(file: File) -> str:
    state = "  (here)" if file.is_here else f"  ({decimal(file.bytes_here)} of it here)" if file.bytes_here else ""
    return f"  {decimal(file.size):>9}  {file.name}{state}"


def room_for(missing: int, place: Path) -> str:
    """What is to be fetched beside what is free; raises DirlError where it does not fit."""
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise DirlError(
            f"{decimal(missing)} are to be fetched and {decimal(free)} are free in {there}: make room, or give another"
            " disk with --to DIR or HF_HOME"
        )
    return f"{decimal(missing)} to fetch, {decimal(free)} free in {there}" if missing else "Nothing to fetch"


def fetch_all(files: Sequence[File], console: PlainConsole) -> None:
    """Fetch files side by side; a live bar in a terminal, ten plain lines elsewhere tell how far they are."""
    files = list({file.partial: file for file in files}.values())  # of twins one
    if not files:
        return
    total, started = sum(file.size for file in files), time.perf_counter()
    before = here = sum(file.bytes_here for file in files)
    columns = [BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True)]
    live = console.is_terminal
    with (
        Progress(*columns, TextColumn("left"), console=console, transient=True, disable=not live) as bar,
        ThreadPool(AT_ONCE) as pool,  # of daemons: Ctrl-C does not wait for them
    ):
        task = bar.add_task("", total=total, completed=before)
        result = pool.map_async(hub.fetch, files, chunksize=1)
        while not result.ready():
            result.wait(0.2)
            tenths, here = 10 * here // total, sum(file.bytes_here for file in files)
            bar.update(task, completed=here)
            if not live and 10 * here // total > tenths:
                speed = (here - before) / (time.perf_counter() - started)
                console.print(f"{decimal(here)} of {decimal(total)}, {decimal(int(speed))}/s")
        result.get()


def next_commands(repositories: Sequence[Repository]) -> Iterator[str]:
    """What to type next, with what was downloaded in its place."""
    words: dict[str, list[str]] = {}
    for repository in repositories:
        choice, to = hub.download_argument(repository.id, repository.kind), repository.to
        if "=" not in choice:
            choice, to = f"{'model' if repository.kind == 'model' else 'data'}={to or repository.id}", None
        group = choice.partition("=")[0]
        if group == "data":
            command = "rl" if repository.id.endswith("-RL") else "sft"
        if group == "bench" and group in words and not to:
            choice = "bench=all"
        words[group] = [choice, *([f"{group}.path={to}"] if to else [])]
    model, data, bench = (words.get(group, []) for group in KINDS)
    model = model or ["model=sdar8b"]
    if data:
        yield shlex.join(["dirl", command, *model, *data])
    if bench or not data:
        yield shlex.join(["dirl", "eval", *model, *bench])


@contextmanager
def explain_hub_errors(repo_id: str, kind: hub.Kind) -> Iterator[None]:
    """Tell what may go wrong on the way from the Hub to the disk in one sentence with its remedy."""
    try:
        yield
    except errors.HFValidationError as error:
        raise DirlError(f"{repo_id} is neither here nor a name on the Hub (OWNER/NAME): check it") from error
    except errors.GatedRepoError as error:
        name = f"datasets/{repo_id}" if kind == "dataset" else repo_id
        raise DirlError(
            f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{name}, then `hf auth login` and try again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name (a data set's begins with datasets/) or `hf auth login`"
        raise DirlError(f"the Hub has no {repo_id}, or it is private: {hint}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise DirlError(f"{repo_id}: {REFUSALS.get(status, TROUBLE)} ({status})") from error
    except errors.OfflineModeIsEnabled as error:
        raise DirlError("HF_HUB_OFFLINE is set, so nothing can be downloaded: unset it") from error
    except (httpx.TransportError, errors.LocalEntryNotFoundError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        unreached = f"{constants.ENDPOINT} cannot be reached for {repo_id}"
        raise DirlError(f"{unreached} ({reason}): check the network, {GO_ON}") from error
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        hint = f"make room or give another place with --to DIR, {GO_ON}"
        raise DirlError(f"{repo_id} cannot be written ({reason}): {hint}") from error
