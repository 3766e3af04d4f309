"""Data files: both forms, both kinds of row, and one sentence for everything that can be wrong with them."""

import json
from pathlib import Path

import pytest

from dirl_cli.data.files import ProblemFile, TrainingFile, read_rows
from dirl_cli.errors import DirlError

PROBLEMS = [{"question": "1+1?", "ground_truth_answer": "2"}, {"question": "2+2?", "ground_truth_answer": 4}]
DEMONSTRATIONS = [{"prompt": f"{i}?", "response": f"{i}."} for i in range(10)]
SHARED = Path(__file__).parents[2] / "shared" / "data"


def save(path: Path, rows: list, lines: bool = False) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows))
    return str(path)


def problems(path: str) -> list:
    return ProblemFile("bench", path).problems()


@pytest.mark.parametrize("lines", [False, True])
def test_a_list_and_lines_hold_the_same_problems(tmp_path: Path, lines: bool) -> None:
    first, second = problems(save(tmp_path / "sums.json", PROBLEMS, lines))
    assert (first.id, first.question, first.answer, first.subset) == ("sums-0", "1+1?", "2", "")
    assert (second.id, second.answer) == ("sums-1", "4")


def test_a_problem_keeps_its_own_id_and_subset(tmp_path: Path) -> None:
    (problem,) = problems(save(tmp_path / "a.json", [{**PROBLEMS[0], "id": 7, "subset": "easy"}]))
    assert (problem.id, problem.subset) == ("7", "easy")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(PROBLEMS[0]) + "\r\n\n  \n" + json.dumps(PROBLEMS[1]) + "\n")
    assert [problem.answer for problem in problems(str(path))] == ["2", "4"]


@pytest.mark.parametrize(("held_out", "size"), [(0, 0), (0.2, 2), (3, 3)])
def test_rows_held_out_are_in_neither_part_twice(tmp_path: Path, held_out: float, size: int) -> None:
    data = TrainingFile("data", save(tmp_path / "a.json", DEMONSTRATIONS), held_out)
    train, validation = data.demonstrations(), data.validation()
    assert len(validation) == size
    assert sorted([*train, *validation], key=lambda row: row["prompt"]) == DEMONSTRATIONS
    assert TrainingFile("data", data.path, held_out).validation() == validation


def test_another_seed_holds_other_rows_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", DEMONSTRATIONS)
    assert TrainingFile("d", path, 3, seed=0).validation() != TrainingFile("d", path, 3, seed=1).validation()


def test_rows_held_out_that_have_answers_are_problems(tmp_path: Path) -> None:
    rows = [{**row, "question": row["prompt"], "ground_truth_answer": str(i)} for i, row in enumerate(DEMONSTRATIONS)]
    data = TrainingFile("d", save(tmp_path / "a.json", rows), held_out=2)
    assert [problem.question for problem in data.problems()] == [row["prompt"] for row in data.validation()]
    assert TrainingFile("d", save(tmp_path / "b.json", DEMONSTRATIONS), held_out=2).problems() == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b'{"question": "a", "ground_truth_answer": "b"}\n{"question": \n', "line 2 is not valid JSON"),
        (b'[{"question": "a",\n  "ground_truth_answer": }]', "line 2 is not valid JSON .*column 26"),
        (b"[" * 100_000, "line 1 is not valid JSON"),
        (b"7", "line 1 is not a JSON object but 7"),
        (b'[{"question": "a", "ground_truth_answer": "b"}, "c"]', 'item 2 is not a JSON object but "c"'),
        (b'[{"question": "a", "ground_truth_answer": "b"}, {"question": "c"}]', "item 2 has no ground_truth_answer"),
        (b'{"question": ["a"], "ground_truth_answer": "b"}', r'line 1: question must be text, not \["a"\]'),
        (b'{"question": "a", "ground_truth_answer": "b", "id": 1}\n' * 2, "two problems with the id 1"),
        (b"\xff\xfe[\x00]\x00", r"not UTF-8 text \(byte 0\)"),
    ],
)
def test_a_bad_problem_file_is_told_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DirlError, match=sentence) as caught:
        problems(str(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a"}, "item 1 has no response"),
        ({"question": "a"}, "item 1 has no prompt"),
        ({"prompt": "a", "response": None}, "response must be text, not null"),
        ({"messages": []}, "one of them the assistant's"),
        ({"messages": [{"role": "user", "content": "a"}]}, "one of them the assistant's"),
        ({"messages": [{"role": "assistant"}]}, "objects with role and content"),
        ({"messages": "a"}, "objects with role and content"),
    ],
)
def test_a_bad_demonstration_is_told_in_one_sentence(tmp_path: Path, row: dict, sentence: str) -> None:
    with pytest.raises(DirlError, match=sentence):
        TrainingFile("d", save(tmp_path / "a.json", [row])).demonstrations()


def test_a_file_that_cannot_be_opened_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DirlError, match="does not exist"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(DirlError, match="cannot be read"):
        read_rows(tmp_path)


def test_all_rows_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(DirlError, match="has 10 rows, so 10 cannot be held out"):
        TrainingFile("d", save(tmp_path / "a.json", DEMONSTRATIONS), held_out=10).demonstrations()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real benchmark files of ../shared/data are not here")
def test_the_real_files_are_read() -> None:
    sizes = {"MATH500": 500, "GSM8K": 1319, "AIME2024": 30, "AIME2025": 30, "OlympiadBench": 675}
    assert {name: len(problems(str(SHARED / f"{name}.json"))) for name in sizes} == sizes
    assert len(TrainingFile("d", str(SHARED / "GSM8K-train-sft.json")).demonstrations()) == 7473


def test_parquet_rows_are_read_like_any_other(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": "1+1?", "ground_truth_answer": "2"}, {"question": "2+2?", "ground_truth_answer": "4"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "sums.parquet")
    problems = ProblemFile("sums", str(tmp_path / "sums.parquet")).problems()
    assert [(one.question, one.answer) for one in problems] == [("1+1?", "2"), ("2+2?", "4")]
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "sums.parquet").read_bytes()[:40])
    with pytest.raises(DirlError, match=r"torn\.parquet is not a Parquet file that can be read"):
        ProblemFile("torn", str(tmp_path / "torn.parquet")).problems()
