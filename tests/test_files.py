"""Data files: both forms, both kinds of row, and one sentence for everything that can be wrong with them."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dirl_cli.data.files import Mix, ProblemFile, TrainingFile, sources_of
from dirl_cli.data.rows import read_rows
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
    data = TrainingFile(save(tmp_path / "a.json", DEMONSTRATIONS), held_out=held_out)
    train, validation = data.demonstrations(), data.validation()
    assert len(validation) == size
    assert sorted([*train, *validation], key=lambda row: row["prompt"]) == DEMONSTRATIONS
    assert TrainingFile(data.path, held_out=held_out).validation() == validation


def test_another_seed_holds_other_rows_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", DEMONSTRATIONS)
    assert TrainingFile(path, held_out=3, seed=0).validation() != TrainingFile(path, held_out=3, seed=1).validation()


def test_rows_held_out_that_have_answers_are_problems(tmp_path: Path) -> None:
    rows = [{**row, "question": row["prompt"], "ground_truth_answer": str(i)} for i, row in enumerate(DEMONSTRATIONS)]
    data = TrainingFile(save(tmp_path / "a.json", rows), held_out=2)
    assert [problem.question for problem in data.problems()] == [row["prompt"] for row in data.validation()]
    assert TrainingFile(save(tmp_path / "b.json", DEMONSTRATIONS), held_out=2).problems() == []


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
        ({"question": "a"}, "item 1 has no response"),
        ({"prompt": "a", "response": None}, "item 1 has no response"),
        ({"prompt": "a", "response": ["b"]}, r"response must be text, not \["),
        (
            {"problem": "a", "solution": "b"},
            r"no question: .*; map yours \(problem, solution\) with columns={question: …}",
        ),
        ({"messages": []}, "one of them the assistant's"),
        ({"messages": [{"role": "user", "content": "a"}]}, "one of them the assistant's"),
        ({"messages": [{"role": "assistant"}]}, "objects with role and content"),
        ({"messages": "a"}, "objects with role and content"),
    ],
)
def test_a_bad_demonstration_is_told_in_one_sentence(tmp_path: Path, row: dict, sentence: str) -> None:
    with pytest.raises(DirlError, match=sentence):
        TrainingFile(save(tmp_path / "a.json", [row])).demonstrations()


def test_a_file_that_cannot_be_opened_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DirlError, match="does not exist"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(DirlError, match=r"cannot be read as a data set .*doesn't contain any data files"):
        read_rows(tmp_path)
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a"}')[:-9])
    with pytest.raises(DirlError, match=r"torn.jsonl.gz cannot be read"):
        read_rows(tmp_path / "torn.jsonl.gz")


def test_all_rows_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(DirlError, match="has 10 rows, so 10 cannot be held out"):
        TrainingFile(save(tmp_path / "a.json", DEMONSTRATIONS), held_out=10).demonstrations()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real benchmark files of ../shared/data are not here")
def test_the_real_files_are_read() -> None:
    sizes = {"MATH500": 500, "GSM8K": 1319, "AIME2024": 30, "AIME2025": 30, "OlympiadBench": 675}
    assert {name: len(problems(str(SHARED / f"{name}.json"))) for name in sizes} == sizes
    assert len(TrainingFile(str(SHARED / "GSM8K-train-sft.json")).demonstrations()) == 7473


def save_table(path: Path, rows: list[dict]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_parquet_rows_are_read_like_any_other(tmp_path):
    rows = [{"question": "1+1?", "ground_truth_answer": "2"}, {"question": "2+2?", "ground_truth_answer": "4"}]
    save_table(tmp_path / "sums.parquet", rows)
    problems = ProblemFile("sums", str(tmp_path / "sums.parquet")).problems()
    assert [(one.question, one.answer) for one in problems] == [("1+1?", "2"), ("2+2?", "4")]
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "sums.parquet").read_bytes()[:40])
    with pytest.raises(DirlError, match=r"torn\.parquet is not a Parquet file that can be read"):
        ProblemFile("torn", str(tmp_path / "torn.parquet")).problems()


def test_a_compressed_file_and_a_null_are_read_like_any_other(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({**PROBLEMS[0], "id": None}).encode()))
    assert problems(str(tmp_path / "a.jsonl.gz"))[0].id == "a.jsonl-0"


def test_a_directory_is_read_by_the_split_that_its_files_name(tmp_path):
    save(tmp_path / "train.jsonl", [{"question": str(i), "ground_truth_answer": "1"} for i in range(3)], lines=True)
    assert len(ProblemFile("d", str(tmp_path)).problems()) == 3
    save(tmp_path / "test.jsonl", PROBLEMS[:1], lines=True)
    with pytest.raises(DirlError, match=r"has the splits train and test: choose one with bench.split= or data.split="):
        ProblemFile("d", str(tmp_path)).problems()
    with pytest.raises(DirlError, match="choose one"):
        ProblemFile("d", str(tmp_path), split="validation").problems()
    assert [one.question for one in ProblemFile("d", str(tmp_path), split="test").problems()] == ["1+1?"]


def test_of_a_data_set_with_several_configs_one_is_chosen(tmp_path):
    for name in ("easy", "hard"):
        save(tmp_path / f"{name}.json", [{"question": name, "ground_truth_answer": "1"}])
    header = [f"- config_name: {name}\n  data_files: {name}.json\n" for name in ("easy", "hard")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(header)}---\n")
    with pytest.raises(DirlError, match=r"pick one among the available configs: \['easy', 'hard'\]") as caught:
        ProblemFile("d", str(tmp_path)).problems()
    assert "\n" not in str(caught.value)
    assert ProblemFile("d", str(tmp_path), config="hard").problems()[0].question == "hard"


def test_a_malformed_file_of_a_directory_is_told_in_one_sentence(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a"\n')
    with pytest.raises(DirlError, match=r"cannot be read as a data set .*JSON parse error") as caught:
        read_rows(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_read_from_where_it_was_downloaded(tmp_path, monkeypatch):
    save(tmp_path / "rows.json", PROBLEMS)
    asked = []
    monkeypatch.setattr("dirl_cli.hub.local", lambda *words: asked.append(words) or tmp_path)
    assert [one.id for one in ProblemFile("d", "Some-One/sums_1.5").problems()] == ["sums_1-0", "sums_1-1"]
    assert asked == [("Some-One/sums_1.5", "dataset")]
    with pytest.raises(DirlError, match=r"no/such.jsonl does not exist"):
        read_rows("no/such.jsonl")


COLUMNS = {"question": "problem", "ground_truth_answer": "answer", "subset": "level"}


def test_columns_go_by_the_names_that_they_are_given(tmp_path):
    path = save(tmp_path / "a.json", [{"problem": "1+1?", "answer": 2, "level": 3, "question": "not this"}])
    (one,) = ProblemFile("a", path, columns=COLUMNS).problems()
    assert (one.question, one.answer, one.subset) == ("1+1?", "2", "3")
    (one,) = TrainingFile(path, "a", columns=COLUMNS).training_problems()
    assert (one.id, one.question) == ("a-0", "1+1?")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"qestion": "problem"}, "columns={qestion: problem}: did you mean question"),
        ({"question": "problme", "ground_truth_answer": "answer"}, r"item 1 has no question: .*\(problem, answer"),
    ],
)
def test_a_mistyped_column_is_told(tmp_path, columns, sentence):
    path = save(tmp_path / "a.json", [{"problem": "1+1?", "answer": "2", "question": "not this"}])
    with pytest.raises(DirlError, match=sentence):
        ProblemFile("a", path, columns=columns).problems()


def test_conversations_may_be_called_otherwise_and_name_the_speakers_as_sharegpt_does(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo", "weight": 1}]}]
    columns = {"messages": "conversations", "role": "from", "content": "value"}
    (row,) = TrainingFile(save(tmp_path / "a.json", rows), columns=columns).demonstrations()
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [("user", "hi"), ("assistant", "yo")]


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"question": "a", "response": 7, "id": 1}, {"question": "a", "response": "7"}),
        ({"question": "a", "prompt": "p", "response": "r"}, {"prompt": "p", "response": "r"}),
    ],
)
def test_of_a_demonstration_what_is_learned_from_is_kept(tmp_path, row, kept):
    assert TrainingFile(save(tmp_path / "a.json", [row])).demonstrations() == [kept]


def test_a_mix_has_its_sources_with_their_weights_and_asks_them_in_turn(tmp_path):
    rows = [{"question": f"{i}?", "ground_truth_answer": str(i)} for i in range(6)]
    first = TrainingFile(save(tmp_path / "a.json", rows[:4]), held_out=3, weight=0.7)
    second = TrainingFile(save(tmp_path / "b.json", rows[4:]), "second", held_out=1, weight=0.3)
    mix = Mix("mix", [first, second])
    sources, weights = sources_of(mix)
    assert ([source.name for source in sources], weights) == ([first.path, "second"], [0.7, 0.3])
    assert [int(one.answer) // 4 for one in mix.problems()] == [0, 1, 0, 0]
    assert sources_of(first) == ([first], [1.0])


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0]])
def test_a_mix_of_nothing_is_told(weights):
    with pytest.raises(DirlError, match=r"data.sources must name at least one file, and every weight must be above 0"):
        Mix("mix", [TrainingFile("a.json", weight=weight) for weight in weights])


def test_sources_of_a_mix_are_told_apart_by_name():
    with pytest.raises(DirlError, match=r"two of data.sources go by the same name: give each a name="):
        Mix("mix", [TrainingFile("a.json"), TrainingFile("a.json", split="test")])
    assert Mix("mix", [TrainingFile("a.json"), TrainingFile("a.json", "b")]).sources[0].name == "a.json"
