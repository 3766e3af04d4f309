"""Answers of long runs, left where they lie: facts of all of them in pieces, the rest of one when it is asked for."""

import gzip
import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.line_files import lines_of
from dirl_cli.text import counted
from dirl_cli.viewer.answer_sources import Kind, ShownAnswer, parse_line
from dirl_cli.viewer.payload import KINDS, Table, TokenReader, answer_facts, trace

PIECE = 5000  # answers
EXCERPT = 200  # characters, of which the page shows fewer
KEPT = 4  # compressed files, as they are decompressed
SEARCH = 0.5  # seconds, after which a search tells what it has


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers, the source that it belongs to, and the step that it is of."""

    source: int
    path: Path
    kind: Kind
    step: int


@dataclass
class ServedAnswers:
    """The answers of some files in order, by their place from 0: a piece of facts for each 5,000, and where they stand.

    readers: of the tokens of each source. picture: the command that draws an answer, of its file and number there.
    """

    files: Sequence[AnswerFile]
    readers: Sequence[TokenReader]
    picture: Callable[[Path, int], str]
    file_of: "array[int]" = field(default_factory=lambda: array("i"))
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    number_of: "array[int]" = field(default_factory=lambda: array("i"))  # in its file, from 1
    pieces: list[bytes] = field(default_factory=list)  # JSON, by gzip
    problems: int = 0
    has_entropy: bool = False

    def __post_init__(self) -> None:
        """Read all files once. Raises DirlError for a malformed line, and where there are no answers."""
        problems = Table()
        groups = Table()
        piece: list[dict[str, Any]] = []
        for number, file in enumerate(self.files):
            for n, (offset, answer) in enumerate(answers_of(file), start=1):
                problem = problems.index((answer.problem.id, answer.problem.question))
                group = groups.index((file.source, answer.step, problem))
                piece.append({"source": file.source, "problem": problem, "group": group, **answer_facts(answer)})
                self.has_entropy |= bool(answer.trajectory and answer.trajectory.entropies)
                self.file_of.append(number)
                self.offsets.append(offset)
                self.number_of.append(n)
                if len(piece) == PIECE:
                    self._keep(piece)
        if piece:
            self._keep(piece)
        self.problems = len(problems.places)

    def _keep(self, piece: list[dict[str, Any]]) -> None:
        self.pieces.append(gzip.compress(json.dumps(piece, separators=(",", ":")).encode(), 5, mtime=0))
        piece.clear()

    def __len__(self) -> int:
        return len(self.offsets)

    def head(self, names: Sequence[str]) -> dict[str, Any]:
        """What the page has before it asks for anything. names: of the sources."""
        sources = []
        for source, name in enumerate(names):
            own = {number for number, file in enumerate(self.files) if file.source == source}
            count = sum(number in own for number in self.file_of)
            kind = self.files[min(own)].kind
            steps = f" in {counted(len(own), 'step')}" if kind == "rollouts" else ""
            sources.append({"name": name, "kind": kind, "summary": f"{counted(count, 'answer')}{steps} {KINDS[kind]}"})
        return {
            "title": " · ".join(names),
            "sources": sources,
            "command": "",
            "served": len(self.pieces),
            "hasEntropy": self.has_entropy,
            "texts": [],
            "prompts": [],
            "problems": [None] * self.problems,
            "answers": [],
        }

    def read(self, place: int) -> ShownAnswer:
        """The answer at a place, read anew. Raises IndexError where there is none, DirlError where its file changed."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        file = self.files[self.file_of[place]]
        try:
            line = line_at(file.path, self.offsets[place])
        except OSError as error:
            raise DirlError(f"{file.path} cannot be read ({error.strerror}): start dirl view again") from error
        return parse_line(file.kind, file.step, f"{file.path} line {self.number_of[place]}", line)

    def whole(self, places: Sequence[int]) -> dict[str, Any]:
        """Answers with their tokens, problems and prompts, in the order of `places`, and the texts of the tokens."""
        texts = Table()
        answers = []
        for place in places:
            answer = self.read(place)
            file = self.files[self.file_of[place]]
            problem = answer.problem
            shown: dict[str, Any] = {
                "asked": {
                    "id": problem.id,
                    "system": problem.system,
                    "question": problem.question,
                    "reference": problem.answer,
                },
                "picture": self.picture(file.path, self.number_of[place]),
            }
            if answer.trajectory is None:
                shown["text"] = answer.text
            else:
                reader = self.readers[file.source]
                shown |= trace(answer.trajectory, reader, texts)
                shown["read"] = reader.text(answer.trajectory.prompt_ids)
            answers.append(shown)
        return {"answers": answers, "texts": texts.values}

    def excerpts(self, places: Sequence[int]) -> list[str]:
        """The beginnings of some answers."""
        return [self.read(place).text[:EXCERPT] for place in places]

    def search(self, words: str, first: int) -> dict[str, Any]:
        """Answers that hold `words` in any case, from a place on: as far as half a second allows.

        Returns their places, and `next`: where to go on, None at the end.
        """
        words = words.lower()
        ends = time.monotonic() + SEARCH
        places = []
        for place in range(first, len(self)):
            answer = self.read(place)
            if words in f"{answer.problem.id} {answer.problem.question} {answer.text}".lower():
                places.append(place)
            if time.monotonic() > ends:
                return {"places": places, "next": place + 1}
        return {"places": places, "next": None}


def answers_of(file: AnswerFile) -> Iterator[tuple[int, ShownAnswer]]:
    """The answers of a file, each with the byte at which its line begins."""
    offset = 0
    for number, line in enumerate(lines_of(file.path), start=1):
        yield offset, parse_line(file.kind, file.step, f"{file.path} line {number}", line)
        offset += len(line)


def line_at(path: Path, offset: int) -> bytes:
    """The line that begins at a byte of a file, or of what it is decompressed to."""
    with compressed_file(path) if path.suffix == ".gz" else path.open("rb") as lines:
        lines.seek(offset)
        return lines.readline()


def compressed_file(path: Path) -> BytesIO:
    return BytesIO(decompressed(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=KEPT)
def decompressed(path: Path, changed: int) -> bytes:
    """What a gzip file holds, kept for the next line of it. changed: when, so that a new file is read anew."""
    return b"".join(lines_of(path))
