"""Two evaluations against each other: the errors that textbooks give, and what is said where they cannot be told."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import hypot, sqrt
from pathlib import Path
from typing import Any

import pytest

from dirl_cli.commands import eval as command
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.compare import Difference, common_problems, compare, differing_settings
from dirl_cli.evaluation.metrics import measure
from dirl_cli.evaluation.result_card import read_evaluation, require_same

ANSWER = GradedAnswer("a", 0, "", False, "stop", 10, 12, 6, 8, 0.5)


def evaluation(out: Path, answers: Sequence[GradedAnswer], problems: Mapping[str, str], **card: Any) -> Path:
    """The directory of an evaluation with these answers; `problems` are the digests of what they answer."""
    out.mkdir()
    facts = {"model": {"name": out.name}, "bench": {"name": "quiz"}, "samples": 1, **card}
    (out / "eval_card.json").write_text(json.dumps({**facts, "metrics": asdict(measure(answers))}))
    (out / "answers.jsonl").write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
    (out / "sampled_from.json").write_text(json.dumps({"problems": problems}))
    return out


def quiz(right: str, lengths: Sequence[int] = (10, 10, 10, 10)) -> list[GradedAnswer]:
    """An answer to each of the problems 0, 1, 2, …; x is right, - is wrong."""
    return [
        replace(ANSWER, problem=str(i), correct=mark == "x", length=length, tokens=length, forwards=i + 1)
        for i, (mark, length) in enumerate(zip(right, lengths, strict=False))
    ]


SAME = {str(i): f"digest {i}" for i in range(4)}


def compared(a: Path, b: Path) -> dict[str, Difference]:
    left, right = read_evaluation(a), read_evaluation(b)
    return dict(compare(left, right, common_problems(left, right)))


def test_answers_to_the_same_problems_are_compared_problem_by_problem(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("xx--", (10, 20, 30, 40)), SAME)
    b = evaluation(tmp_path / "b", quiz("xxx-", (20, 30, 40, 50)), SAME)
    found = compared(a, b)
    accuracy = found["accuracy %"]
    assert (accuracy.a, accuracy.b) == (50, 75)
    assert accuracy.error == pytest.approx(100 * 0.5 / sqrt(4))  # differences 0, 0, 1, 0: s = ½
    assert accuracy.z == pytest.approx(1.0)
    assert (found["length"].a, found["length"].b) == (25, 35)
    assert found["length"].error is found["length"].z is None  # each 10 tokens longer: nothing tells their spread


def test_credit_is_compared_where_it_is_more_than_right_and_wrong(tmp_path: Path) -> None:
    def partly(right: str, credits: Sequence[float]) -> list[GradedAnswer]:
        return [replace(answer, credit=c) for answer, c in zip(quiz(right), credits, strict=True)]

    a = evaluation(tmp_path / "a", partly("x---", (1.0, 0.0, 0.5, 0.5)), SAME)
    b = evaluation(tmp_path / "b", partly("x---", (1.0, 0.5, 0.5, 0.5)), SAME)
    whole = evaluation(tmp_path / "whole", partly("x---", (1.0, 0.0, 0.0, 0.0)), SAME)
    credit = compared(a, b)["credit %"]
    assert (credit.a, credit.b) == (50, 62.5)
    assert credit.error == pytest.approx(100 * 0.25 / sqrt(4))  # differences 0, ½, 0, 0: s = ¼
    assert "credit %" not in compared(whole, whole)


def test_the_error_of_a_ratio_is_that_of_its_values_without_each_problem(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("----", (4, 6, 9, 16)), SAME)
    b = evaluation(tmp_path / "b", quiz("----", (5, 9, 9, 12)), SAME)
    speed = compared(a, b)["tok/fwd"]
    assert (speed.a, speed.b) == (3.5, 3.5)
    without = [(x - y) / (10 - forwards) for forwards, x, y in [(1, 4, 5), (2, 6, 9), (3, 9, 9), (4, 16, 12)]]
    middle = sum(without) / 4
    assert speed.error == pytest.approx(sqrt(3 / 4 * sum((value - middle) ** 2 for value in without)))


def test_only_problems_that_both_have_are_paired(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("xx--"), SAME)
    b = evaluation(tmp_path / "b", quiz("-x-"), {**SAME, "2": "another question under the same id"})
    left, right = read_evaluation(a), read_evaluation(b)
    assert common_problems(left, right) == ["0", "1"]
    assert dict(compare(left, right, ["0", "1"]))["accuracy %"].a == 100


def test_without_common_problems_the_errors_of_both_add_up(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("xx--"), SAME)
    b = evaluation(tmp_path / "b", quiz("xxx-"), {})
    found = compared(a, b)
    errors = [100 * measure(quiz(marks)).standard_error for marks in ("xx--", "xxx-")]
    assert found["accuracy %"].error == pytest.approx(hypot(*errors))
    assert found["length"].z is None


def test_a_card_alone_is_compared_without_pairing(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("xx--"), SAME)
    (tmp_path / "card.json").write_text((a / "eval_card.json").read_text())
    assert compared(a, tmp_path / "card.json")["accuracy %"].z == 0


def test_three_right_against_three_wrong_are_not_beyond_all_doubt(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", quiz("xxx"), SAME), evaluation(tmp_path / "b", quiz("---"), SAME)
    (tmp_path / "card.json").write_text((b / "eval_card.json").read_text())
    for other in (b, tmp_path / "card.json"):  # paired, and from the cards
        accuracy = compared(a, other)["accuracy %"]
        assert (accuracy.a, accuracy.b, accuracy.error, accuracy.z) == (100, 0, None, None)


def test_what_is_set_differently_is_listed(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("xx--"), SAME, decoding={"threshold": 0.5, "top_k": 50})
    b = evaluation(tmp_path / "b", quiz("xx--"), SAME, decoding={"threshold": 0.9, "top_k": 50}, samples=16)
    assert differing_settings(*map(read_evaluation, (a, b))) == ["decoding.threshold: 0.5 → 0.9", "samples: 1 → 16"]


def test_what_was_graded_by_other_code_is_listed(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", quiz("xx--"), SAME, scorers={"my.score": "a" * 64, "my.other": "c" * 64})
    b = evaluation(tmp_path / "b", quiz("xx--"), SAME, scorers={"my.score": "b" * 64, "my.other": "c" * 64})
    assert differing_settings(*map(read_evaluation, (a, b))) == ["the code of my.score: aaaaaaaa → bbbbbbbb"]


def test_a_comparison_is_told_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = evaluation(tmp_path / "a", quiz("----"), SAME), evaluation(tmp_path / "b", quiz("xxx-"), SAME)
    command.show_comparison([str(a), str(b)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "paired over the 4 problems that both answered" in shown
    assert "accuracy % 0.0 75.0 +75.0 ± 25.0 3.0 yes yes" in shown


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_two_are_compared(names: list[str]) -> None:
    with pytest.raises(DirlError, match="compare takes two evaluations"):
        command.show_comparison(names)


def test_an_evaluation_is_found_by_its_name_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DirlError, match="mine holds no finished evaluation: run `dirl eval` first"):
        read_evaluation("mine")
    Path("runs/eval").mkdir(parents=True)
    evaluation(Path("runs/eval/mine"), quiz("xx--"), SAME)
    assert read_evaluation("mine").of == "mine on quiz"
    with pytest.raises(DirlError, match=r"did you mean mine\?"):
        read_evaluation("min")
    with pytest.raises(DirlError, match="is not the card of an evaluation"):
        read_evaluation("runs/eval/mine/answers.jsonl")


def test_what_answers_come_from_may_grow_and_not_change(tmp_path: Path) -> None:
    file = tmp_path / "sampled_from.json"
    require_same(file, {"weights": "w", "problems": {"a": "1"}})
    require_same(file, {"weights": "w", "problems": {"b": "2"}})
    assert json.loads(file.read_text())["problems"] == {"a": "1", "b": "2"}
    with pytest.raises(DirlError, match="answers of other weights and problems, changed since"):
        require_same(file, {"weights": "v", "problems": {"a": "3"}})
