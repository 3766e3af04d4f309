"""The directory of an evaluation: its card, its answers, and what they answer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.evaluation.answers import GradedAnswer, checked, is_a, read_answers
from dirl_cli.evaluation.metrics import Metrics
from dirl_cli.files import write_json

CARD = "eval_card.json"
ANSWERS = "answers.jsonl"
SOURCE = "sampled_from.json"
SECTIONS = ("model", "bench", "instruction", "decoding", "scorers")
HOME = Path("runs/eval")


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation as it lies on disk.

    card: every setting. answers: none where only the card is there. problems: a digest of each question by its id.
    """

    name: str
    card: dict[str, Any]
    metrics: Metrics
    answers: Sequence[GradedAnswer]
    problems: Mapping[str, str]

    @property
    def of(self) -> str:
        """Whose answers they are, and to what."""
        if "model" in self.card:
            source = self.card["model"]["name"]
        else:
            source = self.card["predictions"]
        return f"{source} on {self.card['bench']['name']}"


def read_evaluation(path: str | Path) -> Evaluation:
    """The evaluation in a directory, that of a card, or the one of this name in runs/eval.

    Raises DirlError where there is none, and where it is not one of ours.
    """
    card_file = Path(path).expanduser()
    if not card_file.exists():
        card_file = HOME / path
    if card_file.is_dir():
        card_file = card_file / CARD
    if not card_file.exists():
        names = [file.parent.relative_to(HOME).as_posix() for file in HOME.glob(f"**/{CARD}")]
        hint = "run `dirl eval` first"
        if names:
            hint = did_you_mean(str(path), names)
        raise DirlError(f"{path} holds no finished evaluation: {hint}")

    # A card comes from a file that anybody may have written: every part is checked before it is used.
    folder = card_file.parent
    try:
        card = json.loads(card_file.read_bytes())
        pass_at = {int(m): share for m, share in card["metrics"]["pass_at"].items()}
        metrics = checked(Metrics(**{**card["metrics"], "pass_at": pass_at}))
        if not all(is_a(card.get(group, {}), dict) for group in SECTIONS):
            raise TypeError(f"{' and '.join(SECTIONS)} are objects")
        problems = {}
        if (folder / SOURCE).exists():
            problems = json.loads((folder / SOURCE).read_bytes())["problems"]
        if not is_a(problems, dict[str, str]):
            raise TypeError("problems are digests by id")
        evaluation = Evaluation(str(path), card, metrics, read_answers(folder / ANSWERS), problems)
        evaluation.of  # noqa: B018  # a card that does not say whose answers they are is none
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DirlError(f"{card_file} is not the card of an evaluation: give the directory of one") from error
    return evaluation


def read_card(out: Path) -> dict[str, Any]:
    """The card in a directory, of whatever evaluation; nothing where there is none. Raises DirlError for damage."""
    file = out / CARD
    if not file.is_file():
        return {}
    try:
        card = json.loads(file.read_bytes())
        if not isinstance(card, dict):
            raise ValueError("a card is an object")
    except (ValueError, RecursionError) as error:
        raise DirlError(f"{file} is not the card of an evaluation: remove it, or give another out=") from error
    return card


def require_same(path: Path, source: dict[str, Any]) -> None:
    """Note what answers come from: `problems` by id, anything else as a whole.

    Raises DirlError where those that are already there came from something else.
    """
    if path.exists():
        # The problems may have become more or fewer, by limit or ids: only those of both have to be the same.
        before = json.loads(path.read_text())
        common = before["problems"].keys() & source["problems"].keys()
        changed = [name for name in source if name != "problems" and before[name] != source[name]]
        if any(before["problems"][i] != source["problems"][i] for i in common):
            changed.append("problems")
        if changed:
            raise DirlError(
                f"{path.parent} holds answers of other {' and '.join(changed)}, changed since under the same name:"
                " give this evaluation a name=…, or set that one aside with resume=never"
            )
        source = {**before, **source, "problems": before["problems"] | source["problems"]}
    write_json(path, source)
