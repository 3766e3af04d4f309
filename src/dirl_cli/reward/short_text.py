"""Verify short text: the same words as the reference or one of its aliases, whatever their case and punctuation."""

import re
import unicodedata
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.boxed import final_answer
from dirl_cli.reward.puzzles import TAGGED
from dirl_cli.types import Problem

END_OF_THOUGHT = "</think>"
CUE = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:is|are|would be|should be|must be)\b\s*:?|\s*[:=])", re.IGNORECASE
)
BRACE = re.compile(r"(?:\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed)\s*)?\{|\}")
MARKUP = re.compile(r"\*\*|__|`|(?<!\\)\$|\\[()\[\]]|\\[,;! ]")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d{3}\b)")  # of thousands
KEPT = set("#%")  # punctuation that tells words apart, as in C#


def stated_answer(completion: str) -> str | None:
    """The last box of a completion, its last `<answer>…</answer>`, or what follows its last "answer is" or "Answer:".

    None where it has none of them. Thoughts count only for the box.
    """
    boxed = final_answer(completion)
    if boxed is not None:
        return without_markup(boxed) or None
    text = without_thought(completion)
    tagged = TAGGED.findall(text)
    if tagged:
        return without_markup(str(tagged[-1])) or None

    plain = MARKUP.sub("", text)
    cues = list(CUE.finditer(plain))
    if not cues:
        return None
    lines = [line.strip() for line in plain[cues[-1].end() :].splitlines() if line.strip()]
    return without_markup(lines[0]) or None if lines else None


def text_in(completion: str) -> str | None:
    """What a completion gives for its short answer: as `stated_answer`, otherwise all that follows its thought."""
    return stated_answer(completion) or without_markup(without_thought(completion)) or None


def text_credit(problem: Problem, answer: str) -> float:
    """1 where an answer has the words of the reference or of an alias, else 0 (the exact match of SQuAD)."""
    aliases: Any = problem.details.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise DirlError(f"problem {problem.id} has aliases that are no list of texts: correct them")
    words = normalised(answer)
    return float(bool(words) and words in {normalised(reference) for reference in (problem.answer, *aliases)})


def without_thought(completion: str) -> str:
    """What follows `</think>`, or everything where there is none."""
    return completion.rpartition(END_OF_THOUGHT)[2]


def without_markup(text: str) -> str:
    """The text without the commands of Markdown and LaTeX around its words."""
    return MARKUP.sub("", without_commands(text)).strip()


def without_commands(text: str) -> str:
    r"""The text with what commands such as \text{…} hold in their place, but for those with other braces in them.

    The time is linear in the text, however deep they stand in each other.
    """
    open_groups: list[re.Match[str] | None] = []  # the command that each is of; None where it stays
    taken_out: list[tuple[int, int]] = []  # where commands and their braces begin and end
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            open_groups.append(brace if brace[0] != "{" else None)
        elif open_groups:
            command = open_groups.pop()
            if command is not None:
                taken_out += [command.span(), brace.span()]
            elif open_groups:
                open_groups[-1] = None  # a group that stays keeps the one around it

    kept = []
    end = 0
    for start, next_end in sorted(taken_out):
        kept.append(text[end:start])
        end = next_end
    return "".join(kept) + text[end:]


def normalised(text: str) -> str:
    """Words to compare by: lower case, no articles and punctuation, single spaces; signs and points of numbers stay."""
    text = unicodedata.normalize("NFKC", without_markup(text)).casefold()
    text = BETWEEN_DIGITS.sub("", text)
    characters = []
    for i, character in enumerate(text):
        follows = text[i + 1 : i + 2]
        before = text[i - 1 : i] if i else ""
        is_of_number = follows.isdigit() and (character == "." or (character in "-−" and not before.isalnum()))
        if character in KEPT or is_of_number:
            characters.append("-" if character == "−" else character)
        elif character in "'’":
            continue
        elif unicodedata.category(character).startswith("P"):
            characters.append(" ")
        else:
            characters.append(character)
    words = "".join(characters)
    return " ".join(ARTICLES.sub(" ", words).split()) or " ".join(words.split())
