"""Choices and short text: every way in which a letter or a few words are written, and what is none of them."""

import time
from dataclasses import replace

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.reward.choices import choice_credit, choice_in, option_meant, options_of
from dirl_cli.reward.short_text import normalised, text_credit, text_in, without_markup
from dirl_cli.reward.verifiers import VERIFIERS
from dirl_cli.types import Problem

CITIES = Problem("p", "", "B", verifier="choice", details={"options": ["London", "Paris", "New York", "York"]})
ANIMALS = replace(CITIES, details={"options": ["A cat", "A dog", "dogs and cats", "I"]})
NUMBERS = replace(CITIES, details={"options": {"a": "10", "b": "20", "c": "2", "d": "40"}})
LETTERS = replace(CITIES, details={})


def meant(problem: Problem, completion: str) -> str | None:
    """The option that a completion gives."""
    answer = choice_in(completion)
    return None if answer is None else option_meant(answer, options_of(problem))


@pytest.mark.parametrize(
    "completion",
    [
        # A letter alone.
        "B", "b", "(B)", "(b)", "[B]", "B.", "b)", "**B**", "$B$",
        # After a cue.
        "Answer: B", "Answer:\nB", "**Answer:** B", "The answer is (B).", "The answer is: B", "My choice: b",
        "Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.",
        # In a box or in tags.
        r"\boxed{B}", r"$\boxed{\text{(B)}}$", r"\boxed{\mathrm{b}}", "<answer>B</answer>",
        # With the text of the option, or by it.
        "B. Paris", "(B) Paris", "B) Paris, the capital", "B Paris", "B - Paris", "B: Paris",
        "Paris", "paris.", r"\boxed{Paris}", "The answer is Paris.", "The capital is Paris",
        # In a sentence.
        "I choose B because it is the capital.", "Option B is correct.", "Reasoning: (A) is wrong.\nSo the answer is B",
        # The last of several, and none of what was only thought.
        "First \\boxed{A}. I was wrong, it is \\boxed{B}", "Answer: A\nAnswer: B", "<think>A or (C)</think>B",
        "<think>\nAnswer: A</think>\nAnswer: B",
    ],
)  # fmt: skip
def test_a_choice_is_read_however_it_is_written(completion: str) -> None:
    assert meant(CITIES, completion) == "B"


@pytest.mark.parametrize(
    ("problem", "completion", "option"),
    [
        # An A before a noun is an article.
        (CITIES, "A city", None),
        (CITIES, "The answer is a city", None),
        (CITIES, "It is A, of course", "A"),
        (CITIES, "Option A is correct.", "A"),
        (CITIES, "I think it is the second", None),
        (ANIMALS, "A dog", "B"),
        (ANIMALS, "A cat", "A"),
        (ANIMALS, "The answer is A dog", "B"),
        (ANIMALS, "A", "A"),
        (ANIMALS, "I", "D"),
        # Two letters are none.
        (CITIES, "A or B", None),
        (CITIES, "A and B", None),
        (CITIES, "A, B", None),
        (CITIES, "A) or B)", None),
        (CITIES, "(A) (B)", None),
        (CITIES, r"\boxed{A} and \boxed{B}", None),
        (CITIES, "The answer is not A but B", None),
        (CITIES, "London or Paris", None),
        # A letter and another option's text contradict each other.
        (CITIES, "B. London", None),
        # The longer of two texts, one of which is part of the other.
        (CITIES, "It is New York", "C"),
        # No option.
        (CITIES, "Answer: E", None),
        (CITIES, "", None),
        (CITIES, r"\boxed{", None),
        # Numbers are texts, not letters.
        (NUMBERS, "20", "B"),
        (NUMBERS, "The answer is 2.", "C"),
        (NUMBERS, "Answer: B) 20", "B"),
        (NUMBERS, "Answer: B) 40", None),
        # Without options any letter is one.
        (LETTERS, "Answer: (J)", "J"),
        (LETTERS, "Paris", None),
    ],
)
def test_what_could_be_taken_for_another_choice_is_not(problem: Problem, completion: str, option: str | None) -> None:
    assert meant(problem, completion) == option


def test_the_reference_of_a_choice_is_a_letter_or_a_text() -> None:
    for answer in ("B", "b", "(B)", "Paris"):
        assert choice_credit(replace(CITIES, answer=answer), "B") == 1
        assert choice_credit(replace(CITIES, answer=answer), "A") == 0
    with pytest.raises(DirlError, match="problem p has the answer Rome, which is none of its options"):
        choice_credit(replace(CITIES, answer="Rome"), "B")
    with pytest.raises(DirlError, match="problem p has options that are no list of texts"):
        choice_credit(replace(CITIES, details={"options": "ABCD"}), "B")


BAND = Problem("p", "", "The Beatles", verifier="text", details={"aliases": ["Beatles, The", "Fab Four"]})


@pytest.mark.parametrize(
    ("completion", "credit"),
    [
        ("The Beatles", 1),
        ("beatles.", 1),
        ("the  BEATLES!", 1),
        ("fab four", 1),
        ("Beatles, The", 1),
        ("The answer is The Beatles.", 1),
        ("**Answer:** Beatles", 1),
        ("<answer>Beatles</answer>", 1),
        (r"It is \boxed{\text{Beatles}}", 1),
        (r"\boxed{Stones}, no: \boxed{Beatles}", 1),
        ("<think>Stones</think>\nBeatles", 1),
        ("<think>Beatles</think>Stones", 0),
        ("It was the Beatles", 0),  # an exact match, and no containment
        ("Beatles and Stones", 0),
        ("Beatle", 0),
        ("", 0),
        ("The", 0),
    ],
)
def test_short_text_is_right_where_its_words_are_those_of_the_reference_or_an_alias(
    completion: str, credit: float
) -> None:
    answer = text_in(completion)
    assert (0 if answer is None else text_credit(BAND, answer)) == credit


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("twenty-one", "Twenty one", True),
        ("O’Brien", "O'Brien", True),
        ("1,000", "1000", True),
        ("ﬁne", "fine", True),
        ("$5", "$5", True),
        ("3.5", "35", False),
        ("-5", "5", False),
        ("C#", "C", False),
        ("50%", "50", False),
        ("The", "A", False),  # of articles alone something must be left
    ],
)
def test_words_are_compared_without_case_and_punctuation_that_means_nothing(a: str, b: str, same: bool) -> None:
    assert (normalised(a) == normalised(b)) == same


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\text{B}", "B"),
        (r"\text{\textbf {B} or \mathrm{C}}", "B or C"),
        (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}"),  # other braces say something
        (r"\text{a \boxed{b {c} d} e} \text{f}", r"\text{a \boxed{b {c} d} e} f"),
        (r"\text{a} } \text{b", r"a } \text{b"),
        (r"{ \text{a}", "{ a"),
        (r"\texttt{a}", r"\texttt{a}"),
        (r"\text{\text{a}\text{b}}{c}", "ab{c}"),
    ],
)
def test_commands_around_words_are_taken_out_and_other_braces_are_left(text: str, plain: str) -> None:
    assert without_markup(text) == plain


def test_commands_however_deep_take_the_time_of_as_many_side_by_side() -> None:
    depth = 30_000
    began = time.process_time()
    assert without_markup(r"\text{" * depth + "B" + "}" * depth) == "B"
    assert without_markup(r"\text{" * depth) == r"\text{" * depth
    assert without_markup(r"\text{{" * depth + "}}" * depth) == r"\text{{" * depth + "}}" * depth
    assert meant(CITIES, "The answer is " + r"\text{" * depth + "B" + "}" * depth) == "B"
    assert time.process_time() - began < 10  # a pass over the text for each of them takes more than a minute


@pytest.mark.parametrize("completion", ["." + " " * 100_000 + "!!", "It is A" + " " * 100_000 + "x"])
def test_long_spaces_take_no_time_and_a_text_longer_than_any_answer_has_no_credit(completion: str) -> None:
    began = time.process_time()
    assert option_meant(completion, options_of(CITIES)) is None
    assert VERIFIERS["choice"].quick(CITIES, completion) == 0
    assert time.process_time() - began < 1
    assert VERIFIERS["choice"].quick(CITIES, "B" + " " * 1000 + ".") == 1
    assert VERIFIERS["choice"].quick(CITIES, "I choose B because " + "it is " * 1000) == 0
