"""An evaluation that goes on grades anew what another version of a user's scorer graded."""

import json
from pathlib import Path

import pytest

from dirl_cli.commands import eval as command
from dirl_cli.evaluation.answers import AnswerLog, GradedAnswer, read_answers
from dirl_cli.evaluation.scorer_code import digests_by_scorer, regrade_changed
from dirl_cli.reward.functions import source_digest
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem
from tests.commands.test_eval import config

RED = "def colour(problem, answer):\n    return float('red' in answer)\n"


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    file = tmp_path / "my_scorer.py"
    file.write_text(RED)
    return file


def answered(out: Path, *texts: str) -> None:
    """Answers that are there, none of them right yet."""
    (out / "sampled_from.json").write_text(json.dumps({"weights": "w", "problems": {}}))
    with AnswerLog(out / "answers.jsonl") as log:
        for i, text in enumerate(texts):
            log.append(GradedAnswer(str(i), 0, text, False, "stop", 3, 4, 2, 2, 0.1, credit=0.0))


def credits(out: Path) -> dict[str, float | None]:
    return {answer.problem: answer.credit for answer in read_answers(out / "answers.jsonl")}


def test_only_answers_to_problems_whose_scorer_has_changed_are_graded_anew(tmp_path: Path, scorer: Path) -> None:
    own = [Problem(str(i), "?", "", verifier=f"{scorer}:colour") for i in range(3)]
    asked = [own[0], Problem("1", "?", "red", verifier="text"), own[2]]
    answered(tmp_path, "red", "red", "blue")
    with Grader(workers=1) as grader:
        assert regrade_changed(tmp_path, asked[:2], grader) == 1  # earlier versions noted nothing: once anew
        assert regrade_changed(tmp_path, asked[:2], grader) == 0
        assert regrade_changed(tmp_path, asked, grader) == 1
        assert credits(tmp_path) == {"0": 1, "1": 0, "2": 0}
    before = (tmp_path / "answers.jsonl").read_text()
    scorer.write_text(RED.replace("red", "blue"))
    with Grader(workers=1) as grader:
        assert regrade_changed(tmp_path, asked[:2], grader) == 1
        assert credits(tmp_path) == {"0": 0, "1": 0, "2": 0}
        assert regrade_changed(tmp_path, asked, grader) == 1  # the third was not asked for then
        assert regrade_changed(tmp_path, asked, grader) == 0
    assert credits(tmp_path) == {"0": 0, "1": 0, "2": 1}
    assert (tmp_path / "answers.jsonl").read_text().startswith(before)
    assert json.loads((tmp_path / "sampled_from.json").read_text())["weights"] == "w"


def test_where_a_changed_scorer_fails_the_next_start_grades_anew_all_the_same(tmp_path: Path, scorer: Path) -> None:
    asked = [Problem("0", "?", "", verifier=f"{scorer}:colour")]
    answered(tmp_path, "red")
    noted = {"0": source_digest(f"{scorer}:colour")}
    (tmp_path / "sampled_from.json").write_text(json.dumps({"problems": {}, "scorers": noted}))
    scorer.write_text(RED.replace("float(", "colors("))
    with Grader(workers=1) as grader, pytest.raises(Exception, match="raised NameError"):
        regrade_changed(tmp_path, asked, grader)
    scorer.write_text("\n" + RED)
    with Grader(workers=1) as grader:
        assert regrade_changed(tmp_path, asked, grader) == 1
    assert credits(tmp_path) == {"0": 1}


def test_a_module_has_its_file_and_what_python_itself_holds_its_version(scorer: Path) -> None:
    names = ["json.loads", "json.dumps", "math.floor"]
    digests = digests_by_scorer([Problem("a", "", "", verifier=name) for name in [*names, "math"]])
    assert sorted(digests) == sorted(names)
    assert digests["json.loads"] == digests["json.dumps"] != digests["math.floor"]


def test_a_scorer_runs_once_however_often_its_digest_is_taken(tmp_path: Path) -> None:
    file, runs = tmp_path / "noisy.py", tmp_path / "runs"
    file.write_text(f"with open({str(runs)!r}, 'a') as f:\n    f.write('x')\n" + RED)
    asked = [Problem("a", "", "", verifier=f"{file}:colour")]
    assert digests_by_scorer(asked) == digests_by_scorer(asked) and runs.read_text() == "x"


def test_an_evaluation_that_goes_on_says_that_its_scorer_has_changed(
    tmp_path: Path, scorer: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Which colour?"}\n{"question": "Which other?"}\n')
    bench = {"_target_": "dirl_cli.data.files.ProblemFile", "name": "rows", "path": str(tmp_path / "rows.jsonl")}
    cfg = config(bench={**bench, "verifier": f"{scorer}:colour"})
    for value in ("0.25", "0.25", "0.5"):
        scorer.write_text(f"def colour(problem, answer):\n    return {value}\n")
        command.run(cfg, tmp_path)
        card = json.loads((tmp_path / "eval_card.json").read_text())
        said = capsys.readouterr().out
        if value == "0.25":
            first = card["scorers"]
            assert "anew" not in said
    assert "4 answers graded anew, since a scorer's code is not known to be the same\n" in said
    assert card["scorers"].keys() == {f"{scorer}:colour"} and card["scorers"] != first
