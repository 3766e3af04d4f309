"""Demonstrations as tokens: made once, and kept in a memory-mapped file that is named after all they depend on."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dirl_cli.data import chat
from dirl_cli.data.rows import Row, cache_directory
from dirl_cli.errors import DirlError
from dirl_cli.types import Instruction

SCHEMA = pa.schema({"token_ids": pa.list_(pa.int32()), "trained": pa.list_(pa.bool_()), "answer_tokens": pa.int32()})


@dataclass(frozen=True)
class TokenTable:
    """Those rows of a table of SCHEMA that stand at `places`, each read when it is asked for."""

    table: pa.Table
    places: NDArray[np.int64]

    @staticmethod
    def of(encoded: Sequence[chat.Encoded]) -> "TokenTable":
        """All of these, in memory."""
        return TokenTable(pa.Table.from_batches([record_batch(encoded)]), np.arange(len(encoded)))

    @staticmethod
    def read(file: Path) -> "TokenTable":
        """All rows of a file, which stays on the disk."""
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        return TokenTable(table, np.arange(len(table)))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> chat.Encoded:
        values = (self.table[name][int(self.places[i])].values for name in ("token_ids", "trained"))
        token_ids, trained = (value.to_numpy(zero_copy_only=False).tolist() for value in values)
        return token_ids, trained

    def at_most(self, longest: int) -> "TokenTable":
        """Those that have no more tokens than this."""
        return TokenTable(self.table, self.places[self.lengths <= longest])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each."""
        offsets = [chunk.offsets.to_numpy() for chunk in self.table["token_ids"].chunks]
        return np.concatenate([np.diff(each) for each in offsets] or [self.places])[self.places]

    @property
    def answer_tokens(self) -> int:
        """How many of all tokens are trained."""
        return int(self.table["answer_tokens"].to_numpy()[self.places].sum())

    @property
    def digest(self) -> str:
        """What changes with any of these tokens, their order or what is trained of them."""
        found = hashlib.sha256(self.places.tobytes())
        for name in ("token_ids", "trained"):
            for chunk in self.table[name].chunks:
                found.update(chunk.offsets.to_numpy().tobytes())
                found.update(chunk.values.to_numpy(zero_copy_only=False).tobytes())
        return found.hexdigest()


def record_batch(encoded: Sequence[chat.Encoded]) -> pa.RecordBatch:
    token_ids, trained = [ids for ids, _ in encoded], [flags for _, flags in encoded]
    return pa.record_batch([token_ids, trained, list(map(sum, trained))], schema=SCHEMA)


def tokens_file(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], instruction: Instruction) -> Path:
    """Where the tokens of these rows are kept, whether or not they are there yet."""
    found = hashlib.sha256(Path(chat.__file__).read_bytes())
    found.update(json.dumps([version("transformers"), instruction.messages("?", "!"), instruction.think]).encode())
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for file in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
            found.update(file.read_bytes())
    for row in rows:
        found.update(json.dumps(row.fields, default=str).encode())
    return cache_directory() / "dirl" / f"{found.hexdigest()[:32]}.arrow"


def write_tokens(file: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], instruction: Instruction) -> None:
    """Tokenise the rows, a thousand at a time, into a file that is there whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for first in range(0, len(rows), 1000):
                encoded = chat.encode_demonstrations(tokenizer, rows[first : first + 1000], instruction)
                writer.write_batch(record_batch(encoded))
        partial.replace(file)
    except OSError as error:
        hint = "make room, or name another place with HF_DATASETS_CACHE"
        raise DirlError(f"{file} cannot be written ({error.strerror or error}): {hint}") from error
    finally:
        if partial.exists():
            partial.unlink()
