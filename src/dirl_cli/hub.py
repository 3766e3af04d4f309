"""The Hub: what of a repository is wanted and is on this machine, and how a file comes here, piece by piece."""

import fcntl
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import httpx
from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, hf_raise_for_status, http_stream_backoff

from dirl_cli.errors import DirlError, NotDownloaded
from dirl_cli.files import conf_dir

Kind = Literal["model", "dataset"]

# What is fetched and looked for: no code, no pictures, no copies in other formats. A README's header is read: it names
# a model's licence, and which file of a data set is which split.
WANTED: dict[Kind, list[str]] = {
    "model": ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"],
    "dataset": ["*.json", "*.jsonl", "*.gz", "*.parquet", "README.md"],
}
UNWANTED: dict[Kind, list[str]] = {
    "model": ["*/*"],  # transformers reads the top folder only
    "dataset": ["../*", "*/../*", "/*"],  # nothing leaves the place it is given
}
ATTEMPTS = 6  # in a row that bring nothing


@dataclass(frozen=True)
class File:
    """A file of a repository. Those that the Hub keeps in LFS, with their `sha256`, are large.

    places: where it may be already; the first is where it is to be. partial: where its bytes gather.
    """

    name: str
    size: int
    sha256: str | None
    url: str
    places: tuple[Path, ...]
    partial: Path

    @property
    def is_here(self) -> bool:
        return any(file_size(place) == self.size for place in self.places)

    @property
    def bytes_here(self) -> int:
        gathered = min(file_size(self.partial), self.size)  # first, since a whole file moves from there to its place
        return self.size if self.is_here else gathered


@dataclass(frozen=True)
class Repository:
    """What is wanted of a repository, and the directory it is to be in: `to`, or a snapshot in the Hub's cache."""

    id: str
    kind: Kind
    to: Path | None
    directory: Path
    files: tuple[File, ...]


def file_size(path: Path) -> int:
    """The bytes of a file; none where there is no file."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def local_snapshot(repo_id: str, kind: Kind) -> Path:
    """The directory of the Hub's cache with all that is wanted of a repository; nothing is fetched.

    Raises DirlError that names the `dirl download …` to run where some of it is missing.
    """
    if Path(repo_id.partition("/")[0]).is_dir() or repo_id.startswith("runs/"):  # where nobody means the Hub
        raise DirlError(f"{repo_id} does not exist: check the path")
    try:
        return snapshot(repo_id, kind, None, here=True)
    except HFValidationError as error:
        raise DirlError(f"{repo_id} is neither here nor a name on the Hub (OWNER/NAME): check the path") from error
    except LocalEntryNotFoundError as error:
        missing = "only in part" if isinstance(error, IncompleteSnapshotError) else "not"
        command = f"dirl download {download_argument(repo_id, kind)}"
        raise NotDownloaded(f"{repo_id} is {missing} on this machine: run `{command}` first") from error


def cached_config_directory(repo_id: str) -> Path | None:
    """The directory of the Hub's cache with a model's config.json, whatever else is missing; None where that is."""
    file = try_to_load_from_cache(repo_id, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def snapshot(repo_id: str, kind: Kind, to: Path | None, here: bool = False) -> Path:
    """Lay out what is wanted of a repository in `to` or in the Hub's cache, fetching what is missing unless `here`."""
    return Path(
        snapshot_download(
            repo_id,
            repo_type=kind,
            local_dir=to,
            local_files_only=here,
            allow_patterns=WANTED[kind],
            ignore_patterns=UNWANTED[kind],
        )
    )


def configured_repositories() -> dict[str, str]:
    """The repositories that our configs name, by the words that choose them, such as bench=math500."""
    files = {
        f"{file.parent.name}={file.stem}": file.read_text(encoding="utf-8")
        for file in sorted(conf_dir().glob("*/*.yaml"))
    }
    found = {choice: re.search(r"^path: ([\w.-]+/[\w.-]+)(?!\S)", text, re.M) for choice, text in files.items()}
    return {choice: path[1] for choice, path in found.items() if path}


def download_argument(repo_id: str, kind: Kind) -> str:
    """What `dirl download` is given for a repository: the choice that names it, otherwise its id."""
    choices = [choice for choice, known in configured_repositories().items() if known == repo_id]
    return next(iter(choices), repo_id if kind == "model" else f"datasets/{repo_id}")


def inspect_repository(repo_id: str, kind: Kind, to: Path | None) -> Repository:
    """Ask the Hub what is wanted of a repository, and see what of it is here."""
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    info = ask(repo_id, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind)
    shelf, blobs = cache / "snapshots" / checked_hash(info.sha, repo_id), cache / "blobs"
    found = []
    for each in filter_repo_objects(
        info.siblings or (),
        allow_patterns=WANTED[kind],
        ignore_patterns=UNWANTED[kind],
        key=lambda each: each.rfilename,
    ):
        name, sha256 = each.rfilename, checked_hash(each.lfs.sha256, repo_id) if each.lfs else None
        place = to / name if to else blobs / sha256 if sha256 else shelf / name
        partial = (to / ".cache/huggingface/download" if to else blobs) / f"{sha256}.incomplete"
        url = hf_hub_url(repo_id, name, repo_type=kind, revision=info.sha)
        found.append(File(name, each.size or 0, sha256, url, (place, shelf / name), partial))
    return Repository(repo_id, kind, to, to or shelf, tuple(found))


def checked_hash(answered: str | None, repo_id: str) -> str:
    """What the Hub calls a commit or the sha256 of a file, which becomes the name of a file here."""
    if answered is None or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", answered):
        raise DirlError(
            f"the Hub names a file or commit of {repo_id} by {answered!r}, which is no hash: do not trust it"
        )
    return answered


def fetch(file: File) -> None:
    """Bring what is missing of a large file, from the byte at which an earlier start was cut off, and verify it.

    huggingface_hub goes on only as long as its process lives, and begins anew after that.
    """
    # The second try begins anew, should the first have gone on from damaged bytes.
    if not (download_and_verify(file) or download_and_verify(file)):
        raise DirlError(f"{file.name} comes damaged (not of the sha256 that the Hub names): try again later")


def download_and_verify(file: File) -> bool:
    """Fill the partial file and move it into place; throw it away where it is not what the Hub says it is."""
    file.partial.parent.mkdir(parents=True, exist_ok=True)
    with file.partial.open("a+b", buffering=0) as partial:
        try:
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DirlError(f"{file.name} is being downloaded by another process: wait for it") from error
        fill(file, partial)
        partial.seek(0)
        intact = hashlib.file_digest(partial, "sha256").hexdigest() == file.sha256
        if intact:
            file.places[0].parent.mkdir(parents=True, exist_ok=True)
            file.partial.replace(file.places[0])
        else:
            file.partial.unlink()
    return intact


def fill(file: File, partial: IO[bytes]) -> None:
    """Append what is missing, over as many connections as that takes while each brings something."""
    failures = 0
    while (have := partial.seek(0, 2)) < file.size:
        try:
            receive(file.url, have, partial)
            break
        except httpx.TransportError:
            failures = 0 if partial.tell() > have else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(failures)


def receive(url: str, have: int, partial: IO[bytes]) -> None:
    """Append the bytes from the one numbered `have` on, or begin anew where the server can only send them all."""
    headers = build_hf_headers() | {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    ask = http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=(), max_retries=2)
    with ask as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            partial.truncate(0)
        for chunk in response.iter_bytes():
            partial.write(chunk)
