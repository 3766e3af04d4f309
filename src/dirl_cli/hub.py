"""Snapshots of the Hub: which files of a repository are on this machine, and downloads that can be resumed."""

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
ALLOWED: dict[Kind, list[str]] = {
    "model": ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md"],
    "dataset": ["*.json", "*.jsonl", "*.gz", "*.parquet", "README.md"],
}
IGNORED: dict[Kind, list[str]] = {
    "model": ["*/*"],  # transformers reads the top folder only
    "dataset": ["../*", "*/../*", "/*"],  # nothing leaves its directory
}
ATTEMPTS = 6  # connections in a row that bring nothing


@dataclass(frozen=True)
class File:
    """A file of a repository. Large ones are kept in LFS and have a `sha256`; size in bytes.

    paths: where it may be already; the first is where a download puts it. partial: where its bytes gather until then.
    """

    name: str
    size: int
    sha256: str | None
    url: str
    paths: tuple[Path, ...]
    partial: Path

    @property
    def is_here(self) -> bool:
        return any(file_size(path) == self.size for path in self.paths)

    @property
    def bytes_here(self) -> int:
        # The partial file first: a finished one moves away from there, and would be counted nowhere.
        partial_bytes = min(file_size(self.partial), self.size)
        return self.size if self.is_here else partial_bytes


@dataclass(frozen=True)
class Repository:
    """The files of a repository that we use. directory: where they belong, `to` or a snapshot of the Hub's cache."""

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
    """The snapshot of a repository in the Hub's cache, with all files that we use; nothing is fetched.

    Raises NotDownloaded, with the `dirl download …` to run, where some of it is missing, and DirlError for a name that
    is none.
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
    """The snapshot with a model's config.json, whatever else of it is missing; None where that is missing too."""
    file = try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(file, str):  # nor is it when the Hub has said that there is none
        return None
    return Path(file).parent


def snapshot(repo_id: str, kind: Kind, to: Path | None, here: bool = False) -> Path:
    """Lay out the files that we use of a repository in `to` or in the Hub's cache. Returns the directory.

    here: fetch nothing, and raise what huggingface_hub raises where some are missing.
    """
    return Path(
        snapshot_download(
            repo_id,
            repo_type=kind,
            local_dir=to,
            local_files_only=here,
            allow_patterns=ALLOWED[kind],
            ignore_patterns=IGNORED[kind],
        )
    )


def configured_repositories() -> dict[str, str]:
    """The ids of the repositories that our configs name, by the words that choose them, such as bench=math500."""
    repo_ids = {}
    for file in sorted(conf_dir().glob("*/*.yaml")):
        match = re.search(r"^path: ([\w.-]+/[\w.-]+)(?!\S)", file.read_text(encoding="utf-8"), re.M)
        if match:
            repo_ids[f"{file.parent.name}={file.stem}"] = match[1]
    return repo_ids


def download_argument(repo_id: str, kind: Kind) -> str:
    """The argument of `dirl download` for a repository: the choice of a config that names it, otherwise its id."""
    for choice, configured_id in configured_repositories().items():
        if configured_id == repo_id:
            return choice
    return repo_id if kind == "model" else f"datasets/{repo_id}"


def inspect_repository(repo_id: str, kind: Kind, to: Path | None) -> Repository:
    """Ask the Hub for the files of a repository that we use; which of them are here, each can tell.

    to: the directory they are to be in, None for the Hub's cache.
    """
    get_info = HfApi().model_info if kind == "model" else HfApi().dataset_info
    info = get_info(repo_id, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    entries = filter_repo_objects(
        info.siblings or (),
        allow_patterns=ALLOWED[kind],
        ignore_patterns=IGNORED[kind],
        key=lambda entry: entry.rfilename,
    )

    # The Hub's cache keeps large files by their hash, and a snapshot's names are links to them.
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind)
    snapshot_directory = cache / "snapshots" / checked_hash(info.sha, repo_id)
    blobs = cache / "blobs"
    downloads = to / ".cache/huggingface/download" if to else blobs

    files = []
    for entry in entries:
        name = entry.rfilename
        sha256 = checked_hash(entry.lfs.sha256, repo_id) if entry.lfs else None
        if to:
            path = to / name
        elif sha256:
            path = blobs / sha256
        else:
            path = snapshot_directory / name
        partial = downloads / f"{sha256}.incomplete"
        url = hf_hub_url(repo_id, name, repo_type=kind, revision=info.sha)
        files.append(File(name, entry.size or 0, sha256, url, (path, snapshot_directory / name), partial))
    return Repository(repo_id, kind, to, to or snapshot_directory, tuple(files))


def checked_hash(text: str | None, repo_id: str) -> str:
    """A commit or sha256 as the Hub names it. Raises DirlError for anything else, as it becomes a file's name here."""
    if text is None or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text):
        raise DirlError(f"the Hub names a file or commit of {repo_id} by {text!r}, which is no hash: do not trust it")
    return text


def fetch(file: File) -> None:
    """Download what is missing of a large file, from the byte at which an earlier start was cut off, and verify it.

    huggingface_hub resumes only within a process, and begins anew in the next.
    Raises DirlError where it comes damaged twice.
    """
    # The second try begins anew, should the first have gone on from damaged bytes.
    if not (download_and_verify(file) or download_and_verify(file)):
        raise DirlError(f"{file.name} comes damaged (not of the sha256 that the Hub names): try again later")


def download_and_verify(file: File) -> bool:
    """Fill the partial file and move it to where it belongs. Returns False, and deletes it, if its SHA-256 is wrong.

    Raises DirlError where another process downloads it.
    """
    file.partial.parent.mkdir(parents=True, exist_ok=True)
    with file.partial.open("a+b", buffering=0) as partial:
        # Two that append to one file would mix their bytes.
        try:
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DirlError(f"{file.name} is being downloaded by another process: wait for it") from error
        fill(file, partial)

        # What an earlier start left is read again, too: only the whole file has a digest.
        partial.seek(0)
        is_intact = hashlib.file_digest(partial, "sha256").hexdigest() == file.sha256
        if is_intact:
            file.paths[0].parent.mkdir(parents=True, exist_ok=True)
            file.partial.replace(file.paths[0])
        else:
            file.partial.unlink()
    return is_intact


def fill(file: File, partial: IO[bytes]) -> None:
    """Append what is missing, over as many connections as that takes while each brings something.

    Raises httpx.TransportError after ATTEMPTS connections in a row that brought nothing.
    """
    # A connection that brought anything was worth it, however often they break: only the fruitless are counted.
    failures = 0
    while (size := partial.seek(0, 2)) < file.size:
        try:
            receive(file.url, size, partial)
            break
        except httpx.TransportError:
            failures = 0 if partial.tell() > size else failures + 1
            if failures == ATTEMPTS:
                raise
            time.sleep(failures)


def receive(url: str, start: int, partial: IO[bytes]) -> None:
    """Append the bytes from number `start` on, or begin anew where the server can only send them all."""
    headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    stream = http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=(), max_retries=2)
    with stream as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # not a part, but all of it
            partial.truncate(0)
        for chunk in response.iter_bytes():
            partial.write(chunk)
