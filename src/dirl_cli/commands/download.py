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
CONNECTIONS = 8  # files that are fetched side by side
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
    requests = list(dict.fromkeys(requested_repositories(cfg)))  # each once
    is_packaged = cfg.model is not None and cfg.model.get("package")
    if is_packaged:
        convert_packaged_model(cfg, console)
    if not requests:
        if is_packaged:
            return
        raise DirlError("name what to download, such as model=sdar8b, bench=all, data=bigmath or OWNER/NAME")

    # Look at all of them before any is fetched, so that a name that is wrong or a full disk is told at once.
    repositories = []
    missing_bytes = 0
    for kind, repo_id in requests:
        if not to and Path(repo_id).exists():
            raise DirlError(f"{repo_id} is here, and commands read it: there is nothing to download")
        directory = to
        if to and len(requests) > 1:  # several cannot share one
            directory = to / repo_id
        with explain_hub_errors(repo_id, kind):
            repository = hub.inspect_repository(repo_id, kind, directory)
            require_loadable(repository)
        console.print(format_repository(repository))
        if cfg.dry_run:
            console.print(*map(format_file, repository.files), sep="\n")
        repositories.append(repository)
        missing_bytes += sum(file.size - file.bytes_here for file in repository.files)
    console.print(room_for(missing_bytes, to or Path(constants.HF_HUB_CACHE)))
    if cfg.dry_run:
        return

    # Large files by our own downloads, which go on where they were cut off; the small ones by huggingface_hub.
    for repository in repositories:
        with explain_hub_errors(repository.id, repository.kind):
            large = [file for file in repository.files if file.sha256 and not file.is_here]
            fetch_all(large, console)
            hub.snapshot(repository.id, repository.kind, repository.to)
        console.print(f"{repository.id} is in {repository.directory}")
    for command in next_commands(repositories):
        console.print(f"Next: {command}")


def convert_packaged_model(cfg: DictConfig, console: PlainConsole) -> None:
    """Convert the model that an installed package brings, unless it is converted already."""
    from dirl_cli.models.from_causal import convert_gguf

    directory = Path(cfg.to or cfg.model.path)
    if not cfg.dry_run and not (directory / "config.json").exists():
        convert_gguf(cfg.model.package, cfg.model.file, directory)
    state = "is to be in" if cfg.dry_run else "is in"
    console.print(f"{cfg.model.name} {state} {directory}")
    # What it can do at once, a token at a time; to learn blocks, it wants data and a recipe (docs/smollm2.md).
    path = f" model.path={directory}" if cfg.to else ""
    overrides = f"model={cfg.model.name}{path} model.block_size=1 decoding=sequential"
    console.print(f"Next: dirl generate {overrides} prompt='What is the capital of France?'")


def requested_repositories(cfg: DictConfig) -> Iterator[tuple[hub.Kind, str]]:
    """The kind and the id of each repository that the command line names, by a choice or by its id.

    Raises DirlError for a choice without a repository, and for an id that a choice should name.
    """
    choices = hub.configured_repositories()
    for group in filter(cfg.get, KINDS):
        # A choice has its repository as `path`; `all` lists choices, of which an embedded one has no repository.
        choice = cfg[group]
        if choice.get("package"):
            continue  # it comes from a package
        if "each" in choice:  # of bench=all
            for name in choice.each:
                repo_id = choices.get(f"{group}={name}")
                if repo_id:
                    yield KINDS[group], repo_id
        elif "path" in choice:
            yield KINDS[group], choice.path
        else:
            raise DirlError(f"{group}={choice.name} names no repository of the Hub: there is nothing to download")

    # A repository that a choice names is to be asked for by it, whose config knows what the files do not say.
    for word in cfg.ids:
        repo_id = word.removeprefix(f"{constants.ENDPOINT}/")
        meant = [choice for choice in choices if choice.endswith(f"={repo_id}")]
        if meant:
            raise DirlError(f"{repo_id}: did you mean {' or '.join(meant)}?")
        if repo_id.startswith("datasets/"):
            yield "dataset", repo_id.removeprefix("datasets/")
        else:
            yield "model", repo_id


def require_loadable(repository: Repository) -> None:
    """Raises DirlError for a repository without files in a format that is loaded here."""
    suffixes = {Path(file.name).suffix for file in repository.files}
    if repository.kind == "model" and ".safetensors" not in suffixes:
        raise DirlError(
            f"{repository.id} has no weights in safetensors, the one format that is loaded here: take a repository that"
            " has, or load it elsewhere and save it with save_pretrained"
        )
    if not suffixes & {".safetensors", ".json", ".jsonl", ".gz", ".parquet"}:
        raise DirlError(f"{repository.id} holds no JSON, JSONL or Parquet file: take another data set")


def format_repository(repository: Repository) -> str:
    """Such as: OWNER/NAME: 12 files, 16.4 GB, 3.2 GB of it here."""
    total = sum(file.size for file in repository.files)
    here = sum(file.bytes_here for file in repository.files)
    if here == total:
        state = "all here"
    elif here:
        state = f"{decimal(here)} of it here"
    else:
        state = "none of it here"
    return f"{repository.id}: {len(repository.files)} files, {decimal(total)}, {state}"


def format_file(file: File) -> str:
    """Such as: 1.2 GB  model.safetensors  (300 MB of it here)."""
    state = ""
    if file.is_here:
        state = "  (here)"
    elif file.bytes_here:
        state = f"  ({decimal(file.bytes_here)} of it here)"
    return f"  {decimal(file.size):>9}  {file.name}{state}"


def room_for(missing_bytes: int, directory: Path) -> str:
    """A line on what is to be fetched and what is free. Raises DirlError where it does not fit."""
    # The directory may not be there yet: the disk is that of the nearest one above it.
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if missing_bytes > free:
        raise DirlError(
            f"{decimal(missing_bytes)} are to be fetched and {decimal(free)} are free in {existing}: make room, or give"
            " another disk with --to DIR or HF_HOME"
        )
    if not missing_bytes:
        return "Nothing to fetch"
    return f"{decimal(missing_bytes)} to fetch, {decimal(free)} free in {existing}"


def fetch_all(files: Sequence[File], console: PlainConsole) -> None:
    """Fetch files side by side; a live bar in a terminal, ten plain lines elsewhere show how far they are."""
    files = list({file.partial: file for file in files}.values())  # of two with the same content one
    if not files:
        return

    # What an earlier start left here is done, but no part of this one's speed.
    total = sum(file.size for file in files)
    before = sum(file.bytes_here for file in files)  # bytes
    here = before
    started = time.perf_counter()

    columns = [BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True)]
    live = console.is_terminal
    with (
        Progress(*columns, TextColumn("left"), console=console, transient=True, disable=not live) as bar,
        ThreadPool(CONNECTIONS) as pool,  # of daemons: Ctrl-C does not wait for them
    ):
        task = bar.add_task("", total=total, completed=before)
        result = pool.map_async(hub.fetch, files, chunksize=1)
        while not result.ready():
            result.wait(0.2)
            tenths = 10 * here // total
            here = sum(file.bytes_here for file in files)
            bar.update(task, completed=here)
            if not live and 10 * here // total > tenths:
                speed = (here - before) / (time.perf_counter() - started)
                console.print(f"{decimal(here)} of {decimal(total)}, {decimal(int(speed))}/s")
        result.get()


def next_commands(repositories: Sequence[Repository]) -> Iterator[str]:
    """The commands that use what was downloaded."""
    words: dict[str, list[str]] = {}  # overrides by group
    for repository in repositories:
        choice = hub.download_argument(repository.id, repository.kind)
        to = repository.to
        # What lies in the Hub's cache is found by the choice alone; elsewhere the path has to be told.
        if "=" not in choice:  # no config of ours names it
            path = to or repository.id
            choice = f"model={path}" if repository.kind == "model" else f"data={path}"
            to = None
        group = choice.partition("=")[0]
        if group == "data":
            command = "rl" if repository.id.endswith("-RL") else "sft"
        if group == "bench" and group in words and not to:
            choice = "bench=all"
        words[group] = [choice]
        if to:
            words[group].append(f"{group}.path={to}")

    model = words.get("model", ["model=sdar8b"])
    data = words.get("data", [])
    bench = words.get("bench", [])
    if data:
        yield shlex.join(["dirl", command, *model, *data])
    if bench or not data:
        yield shlex.join(["dirl", "eval", *model, *bench])


@contextmanager
def explain_hub_errors(repo_id: str, kind: hub.Kind) -> Iterator[None]:
    """Raise what goes wrong between the Hub and the disk as a DirlError: one sentence with its remedy."""
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
