"""Demonstrations as tokens: made once, and cached in a memory-mapped file that is named after all they depend on."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
REVEALED_AT = "revealed_at"  # a column of sampled answers


@dataclass(frozen=True)
class TokenTable:
    """Tokenized examples: the rows of a table of SCHEMA that stand at `indices`, each read when it is asked for.

    indices: (examples,), rows of the table. Of sampled answers the table has REVEALED_AT besides.
    """

    table: pa.Table
    indices: NDArray[np.int64]

    @staticmethod
    def of(encoded: Sequence[chat.Encoded], revealed_at: Sequence[Sequence[int]] | None = None) -> "TokenTable":
        """A table of examples in memory. revealed_at: of sampled ones the forward that revealed each token."""
        table = pa.Table.from_batches([record_batch(encoded)])
        if revealed_at is not None:
            table = table.append_column(REVEALED_AT, pa.array(revealed_at, pa.list_(pa.int32())))
        return TokenTable(table, np.arange(len(encoded)))

    @staticmethod
    def read(file: Path) -> "TokenTable":
        """The examples of a file, which stays on the disk (memory-mapped)."""
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        return TokenTable(table, np.arange(len(table)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> chat.Encoded:
        row = int(self.indices[i])
        token_ids = self.table["token_ids"][row].values.to_numpy(zero_copy_only=False)  # (tokens,)
        trained = self.table["trained"][row].values.to_numpy(zero_copy_only=False)  # (tokens,)
        return token_ids.tolist(), trained.tolist()

    def revealed_at(self, i: int) -> list[int] | None:
        """The forward that revealed each token of a sampled answer, HELD where none did; None of any other example."""
        if REVEALED_AT not in self.table.column_names:
            return None
        forwards: list[int] = self.table[REVEALED_AT][int(self.indices[i])].values.to_pylist()
        return forwards

    def at_most(self, longest: int) -> "TokenTable":
        """The examples of at most `longest` tokens."""
        return TokenTable(self.table, self.indices[self.lengths <= longest])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each example: (examples,)."""
        chunks = self.table["token_ids"].chunks
        if not chunks:
            return self.indices  # there are none
        lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])  # (rows of the table,)
        return lengths[self.indices]

    @property
    def answer_tokens(self) -> int:
        """How many of all tokens are trained on."""
        return int(self.table["answer_tokens"].to_numpy()[self.indices].sum())

    @property
    def digest(self) -> str:
        """A SHA-256 that changes with any of the tokens, their order, which are trained on or when they came up."""
        sha256 = hashlib.sha256(self.indices.tobytes())
        names = ["token_ids", "trained"]
        if REVEALED_AT in self.table.column_names:
            names.append(REVEALED_AT)
        for name in names:
            for chunk in self.table[name].chunks:
                sha256.update(chunk.offsets.to_numpy().tobytes())
                sha256.update(chunk.values.to_numpy(zero_copy_only=False).tobytes())
        return sha256.hexdigest()


@dataclass(frozen=True)
class PairTable:
    """Tokenized pairs: example i of `chosen` and of `rejected` answer the same."""

    chosen: TokenTable
    rejected: TokenTable

    @staticmethod
    def of_alternating(tokens: TokenTable) -> "PairTable":
        """The pairs of a table in which each chosen answer is followed by the rejected one."""
        return PairTable(replace(tokens, indices=tokens.indices[0::2]), replace(tokens, indices=tokens.indices[1::2]))

    def at_most(self, longest: int) -> "PairTable":
        """The pairs of which both examples have at most `longest` tokens."""
        fits = (self.chosen.lengths <= longest) & (self.rejected.lengths <= longest)
        return PairTable(
            replace(self.chosen, indices=self.chosen.indices[fits]),
            replace(self.rejected, indices=self.rejected.indices[fits]),
        )


def record_batch(encoded: Sequence[chat.Encoded]) -> pa.RecordBatch:
    """The examples as rows of SCHEMA."""
    token_ids = [ids for ids, _ in encoded]
    trained = [flags for _, flags in encoded]
    answer_tokens = [sum(flags) for flags in trained]
    return pa.record_batch([token_ids, trained, answer_tokens], schema=SCHEMA)


def tokens_file(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], instruction: Instruction) -> Path:
    """The path of the rows' tokens in the cache, whether or not they are there yet.

    Its name is a digest of all that they depend on: our code, transformers, the instruction, the tokenizer's files,
    and the rows themselves.
    """
    sha256 = hashlib.sha256(Path(chat.__file__).read_bytes())
    sha256.update(json.dumps([version("transformers"), instruction.messages("?", "!"), instruction.think]).encode())
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for file in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
            sha256.update(file.read_bytes())
    for row in rows:
        sha256.update(json.dumps(row.fields, default=str).encode())
    return cache_directory() / "dirl" / f"{sha256.hexdigest()[:32]}.arrow"


def write_tokens(file: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], instruction: Instruction) -> None:
    """Tokenise the rows, a thousand at a time, and write them atomically. Raises DirlError for a full disk."""
    # Several runs may tokenise the same rows at once: each writes a file of its own, and renames it to the same.
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
