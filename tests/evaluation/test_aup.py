"""Accuracy under parallelism, against values that were computed by hand from the authors' formula."""

import csv
import json
from dataclasses import asdict, replace
from math import exp
from pathlib import Path

import pytest

from dirl_cli.commands.eval_comparison import after_sweep
from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.evaluation.aup import Speed, curve_of
from dirl_cli.evaluation.metrics import measure

ANSWER = GradedAnswer("a", 0, "", False, "stop", 8, 12, 4, 4, 0.5)


def speeds(*points: tuple[float, float]) -> list[Speed]:
    return [Speed(tpf, accuracy, f"{tpf}") for tpf, accuracy in points]


@pytest.mark.parametrize(
    ("points", "best", "area"),
    [
        # The first term is not weighted: ρ₁ y₁.
        ([(2, 80)], 80, 160),
        ([(2, 80)], 100, 160),
        # 80 + ½ 1 (80 + 80) + ½ 2 (76 e^-0.15 + 80), and 76 e^-0.15 = 65.4138
        ([(1, 80), (2, 80), (4, 76)], 80, 305.4138),
        # Against a method that reaches 100: W(80) = e^-0.6 = 0.548812, W(76) = e^-0.72 = 0.486752.
        ([(1, 80), (2, 80), (4, 76)], 100, 80 + 43.9049 + 80.8981),
        # In any order.
        ([(4, 76), (1, 80), (2, 80)], 80, 305.4138),
        # What lost more than 5 points is left out, and its neighbours joined: 80 + ½ 3 (65.4138 + 80).
        ([(1, 80), (2, 70), (4, 76)], 80, 298.1207),
        # 5 points less are allowed, also where the shares of answers do not add up in floats.
        ([(1, 55.00000000000001), (2, 50)], 55.00000000000001, 55 + 0.5 * (50 * exp(-3 / 11) + 55)),
        # A faster setting may be better than the slowest; W is then 1 at it.
        ([(1, 76), (2, 80)], 80, 76 + 0.5 * (80 + 65.4138)),
        ([(1, 0), (2, 0)], 0, 0),
    ],
)
def test_the_area_is_what_the_formula_gives_by_hand(points, best, area):
    assert curve_of(speeds(*points), best).area == pytest.approx(area, abs=1e-3)


def test_where_the_fastest_setting_lost_too_much_there_is_no_area():
    curve = curve_of(speeds((1, 80), (2, 79), (3, 74.9)), 80)
    assert curve.area is None and curve.counted == (True, True, False)
    assert curve.refusal == "the fastest setting, 3, loses 5.1 points, more than 5: sweep without it"


def test_tokens_per_forward_are_those_before_the_stop_token_summed_over_all_answers():
    metrics = measure([ANSWER, replace(ANSWER, problem="b", length=2, tokens=4, denoise_forwards=5, forwards=6)])
    assert metrics.tpf == (8 + 2) / (4 + 6)
    assert metrics.tokens_per_forward == (12 + 4) / (4 + 6)
    assert measure([replace(ANSWER, length=0, tokens=0, denoise_forwards=0, forwards=0)]).tpf is None


def evaluation(out: Path, right: int, forwards: int, model: str) -> Path:
    """The card of 100 answers of 8 tokens, so many right, each in so many forwards."""
    answers = [replace(ANSWER, problem=str(i), correct=i < right, forwards=forwards) for i in range(100)]
    facts = {"model": {"name": model}, "bench": {"name": "quiz"}}
    out.mkdir(parents=True)
    (out / "eval_card.json").write_text(json.dumps({**facts, "metrics": asdict(measure(answers))}))
    return out


def test_a_sweep_of_thresholds_ends_in_the_area_of_each_method_in_table_card_csv_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tried = [("a", "0.9", 80, 8), ("a", "0.7", 80, 4), ("a", "0.5", 76, 2), ("b", "0.9", 100, 8), ("b", "0.5", 50, 4)]
    jobs = [
        ([f"model={model}", f"decoding.threshold={t}"], evaluation(tmp_path / f"{model}{t}", right, forwards, model))
        for model, t, right, forwards in tried
    ]
    after_sweep("swept", jobs)
    shown = " ".join(capsys.readouterr().out.split())
    assert "AUP of a on quiz: 204.8" in shown  # y_max is b's 100: see above
    assert "AUP of b on quiz: the fastest setting, 0.5, loses 50.0 points, more than 5: sweep without it" in shown

    card = json.loads((tmp_path / "quiz-swept.json").read_text())["aup"]
    assert card["a on quiz"]["area"] == pytest.approx(204.803, abs=1e-3) and card["b on quiz"]["area"] is None
    assert card["a on quiz"]["points"] == [
        {"tpf": 1.0, "accuracy": 80.0, "label": "0.9"},
        {"tpf": 2.0, "accuracy": 80.0, "label": "0.7"},
        {"tpf": 4.0, "accuracy": 76.0, "label": "0.5"},
    ]
    assert card["b on quiz"]["counted"] == [True, False]
    with (tmp_path / "quiz-swept.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["tpf"] for line in lines] == ["1.0", "2.0", "4.0", "1.0", "2.0"]
    assert float(lines[2]["aup"]) == pytest.approx(204.803, abs=1e-3) and lines[4]["aup"] == ""
    assert float(lines[2]["aup_weight"]) == pytest.approx(0.486752, abs=1e-6)
    assert (tmp_path / "quiz-swept.png").read_bytes().startswith(b"\x89PNG")
