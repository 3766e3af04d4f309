"""Verify a choice among options: a letter however it is written, or the text of the option."""

import re
from typing import Any

from dirl_cli.errors import DirlError
from dirl_cli.reward.short_text import normalised, stated_answer, without_markup, without_thought
from dirl_cli.types import Problem

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALONE = re.compile(r"\W*(?:option|choice|answer)?\s*\(?\[?([A-Za-z0-9])\]?\)?\W*", re.IGNORECASE)
HEADED = re.compile(
    r"\s*(?:option|choice|answer)?\s*(?:[(\[]([A-Za-z0-9])[)\]]|([A-Za-z0-9])\s*[).:\]])\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
LEADING = re.compile(r"\s*([A-Za-z0-9])\s+(?:[-–—]\s+)?(.*)", re.DOTALL)  # a letter, then a text
ANOTHER = re.compile(
    r"(?:(?:and|or|nor|,|/|&)\s*[(\[]?([A-Za-z0-9])(?![A-Za-z0-9])|[(\[]([A-Za-z0-9])[)\]])", re.IGNORECASE
)

# A letter in a sentence: in brackets, after a word for it, or a capital alone; A and I only where no noun can follow.
IN_BRACKETS = re.compile(r"[(\[]([A-Za-z])[)\]]")
AFTER_WORD = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter)s?\s+([A-Z])(?![\w'’])")
CAPITAL = re.compile(r"(?<![\w'’.])([B-HJ-Z])(?![\w'’]|\.\w)")
A_OR_I = re.compile(r"(?<![\w'’.])([AI])(?=\s*(?:[,;:)]|\.?\s*$|\.\s|(?:and|or|nor|but|because|since|as)\b))")


def choice_in(completion: str) -> str | None:
    """What a completion gives for its choice: what `stated_answer` finds, otherwise its last line."""
    stated = stated_answer(completion)
    if stated is not None:
        return stated
    lines = [line for line in without_thought(completion).splitlines() if line.strip()]
    return without_markup(lines[-1]) or None if lines else None


def choice_credit(problem: Problem, answer: str) -> float:
    """1 for the letter or the text of the right option; 0 for others, for several, and for none."""
    options = options_of(problem)
    right = option_meant(problem.answer, options)
    if right is None or (options and right not in options):
        raise DirlError(
            f"problem {problem.id} has the answer {problem.answer[:40]}, which is none of its options:"
            " give the letter or the text of one"
        )
    return float(option_meant(answer, options) == right)


def options_of(problem: Problem) -> dict[str, str]:
    """The options by their letters; none where only a letter is asked for. Raises DirlError for what is no options."""
    options: Any = problem.details.get("options", {})
    if isinstance(options, list):
        options = dict(zip(LETTERS, options, strict=False))
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        raise DirlError(f"problem {problem.id} has options that are no list of texts: correct them")
    return {str(label).upper(): text for label, text in options.items()}


def option_meant(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the one option that an answer names; None where it names none, several, or two that contradict."""
    text = " ".join(without_markup(answer).split())  # on long spaces the patterns take the square of the time
    if (alone := ALONE.fullmatch(text)) and is_label(alone[1], options):
        return alone[1].upper()

    # The text of an option goes before letters: "A dog" is the dog, whatever option A is.
    by_text = [label for label, option in options.items() if normalised(option) == normalised(text)]
    if len(by_text) == 1:
        return by_text[0]

    # A letter with the text after it; the text of another option contradicts it.
    if headed := HEADED.fullmatch(text):
        letter = (headed[1] or headed[2]).upper()
        rest = headed[3]
        if is_label(letter, options):
            second = ANOTHER.match(rest)
            other = (second[1] or second[2]).upper() if second else letter
            is_of_two = other != letter and is_label(other, options)
            return None if is_of_two or contradicts(rest, letter, options) else letter
    if leading := LEADING.fullmatch(text):
        letter = leading[1].upper()
        if normalised(options.get(letter, "")) == normalised(leading[2]) != "":
            return letter

    letters = letters_named(text, options)
    if letters:
        return letters.pop() if len(letters) == 1 else None
    return option_contained(text, options)


def is_label(letter: str, options: dict[str, str]) -> bool:
    """Whether an option is called so; any letter is one where the options are not known."""
    return letter.upper() in (options or LETTERS)


def contradicts(text: str, letter: str, options: dict[str, str]) -> bool:
    """Whether a text is that of another option than the letter's."""
    same = normalised(text)
    others = [normalised(option) for label, option in options.items() if label != letter]
    return same in others and same != normalised(options.get(letter, ""))


def letters_named(text: str, options: dict[str, str]) -> set[str]:
    """The letters of options that a sentence names; an A before a noun is an article."""
    letters = set()
    for pattern in (IN_BRACKETS, AFTER_WORD, CAPITAL, A_OR_I):
        for letter in pattern.findall(text):
            if is_label(letter, options):
                letters.add(letter.upper())
    return letters


def option_contained(text: str, options: dict[str, str]) -> str | None:
    """The letter of the one option whose text a sentence holds; one that is part of another's text does not count."""
    sentence = f" {normalised(text)} "
    contained = {}
    for label, option in options.items():
        words = normalised(option)
        if words and f" {words} " in sentence:
            contained[label] = f" {words} "
    whole = []
    for label, words in contained.items():
        if not any(words != other and words in other for other in contained.values()):
            whole.append(label)
    return whole[0] if len(whole) == 1 else None
