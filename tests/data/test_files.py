"""Data files: both forms, both kinds of row, and one sentence for everything that can be wrong with them."""

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from hydra import compose, initialize_config_dir
from pyarrow import parquet

from dirl_cli.cli.build import build
from dirl_cli.data.columns import summarize_notes
from dirl_cli.data.files import Mix, ProblemFile, TrainingFile, sources_of
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from tests.helpers.paths import ROOT, SHARED

PROBLEMS = [{"question": "1+1?", "ground_truth_answer": "2"}, {"question": "2+2?", "ground_truth_answer": 4}]
DEMONSTRATIONS = [{"prompt": f"{i}?", "response": f"{i}."} for i in range(10)]
DATA = SHARED / "data"


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
    train, validation = [row.fields for row in data.demonstrations()], [row.fields for row in data.validation()]
    assert len(validation) == size
    assert sorted([*train, *validation], key=lambda row: row["prompt"]) == DEMONSTRATIONS
    assert [row.fields for row in TrainingFile(data.path, held_out=held_out).validation()] == validation


def test_another_seed_holds_other_rows_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", DEMONSTRATIONS)
    assert TrainingFile(path, held_out=3, seed=0).validation() != TrainingFile(path, held_out=3, seed=1).validation()


def test_rows_held_out_that_have_answers_are_problems(tmp_path: Path) -> None:
    rows = [{**row, "question": row["prompt"], "ground_truth_answer": str(i)} for i, row in enumerate(DEMONSTRATIONS)]
    data = TrainingFile(save(tmp_path / "a.json", rows), held_out=2)
    assert [problem.question for problem in data.problems()] == [row.fields["prompt"] for row in data.validation()]
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
        ({"prompt": None, "response": "a"}, "item 1 has no question"),
        ({"prompt": "a", "response": ["b"]}, r"response must be text, not \["),
        (
            {"problem": "a", "solution": "b"},
            r"no question: .*; map yours \(problem, solution\) with 'data.columns={question: …}'",
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


@pytest.mark.skipif(not DATA.is_dir(), reason="the real benchmark files of ../shared/data are not here")
def test_the_real_files_are_read() -> None:
    sizes = {"MATH500": 500, "GSM8K": 1319, "AIME2024": 30, "AIME2025": 30, "OlympiadBench": 675}
    assert {name: len(problems(str(DATA / f"{name}.json"))) for name in sizes} == sizes
    assert len(TrainingFile(str(DATA / "GSM8K-train-sft.json")).demonstrations()) == 7473


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
    monkeypatch.setattr("dirl_cli.hub.local_snapshot", lambda *words: asked.append(words) or tmp_path)
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


def test_a_column_that_gives_way_to_another_of_its_name_is_told(tmp_path):
    rows = [{"problem": f"{i}+1?", "answer": i + 1, "question": "not this" if i else None} for i in range(3)]
    path = save(tmp_path / "a.json", rows)
    said = "`problem` is taken for `question`, and its own `question` is not read"
    for data in (ProblemFile("a", path, columns=COLUMNS), TrainingFile(path, columns=COLUMNS)):
        assert data.remarks() == [f"2 rows: {said} (first {path} item 2)"]
    learning = TrainingFile(path, columns={"question": "problem", "response": "answer"})
    assert summarize_notes(learning.demonstrations()) == [f"2 rows: {said} (first {path} item 2)"]


def test_columns_that_change_places_lose_nothing(tmp_path):
    columns = {"question": "response", "response": "question"}
    row = learned(tmp_path, {"question": "4", "response": "2+2?"}, columns=columns)
    assert row == (row.location, {"question": "2+2?", "response": "4"}, (), {})


def test_a_part_of_a_turn_that_gives_way_to_another_of_its_name_is_told(tmp_path):
    turns = [{"role": "user", "text": "hi"}, {"role": "assistant", "content": "raw", "text": "yo"}]
    row = learned(tmp_path, {"messages": turns}, columns={"content": "text"})
    assert row.fields["messages"][1]["content"] == "yo"
    assert row.notes[0] == "`text` is taken for `content`, and its own `content` is not read"


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"qestion": "problem"}, "columns={qestion: problem}: did you mean question"),
        (
            {"question": "problme", "ground_truth_answer": "answer"},
            r"no question: .*\(problem, ground_truth_answer\) with 'bench.columns={question: …}'",
        ),
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
    assert [(turn["role"], turn["content"]) for turn in row.fields["messages"]] == [("user", "hi"), ("assistant", "yo")]


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ({"question": "a", "response": 7, "id": 1}, {"question": "a", "response": "7"}),
        ({"question": "a", "prompt": "p", "response": "r"}, {"prompt": "p", "response": "r"}),
    ],
)
def test_of_a_demonstration_what_is_learned_from_is_kept(tmp_path, row, kept):
    (found,) = TrainingFile(save(tmp_path / "a.json", [row])).demonstrations()
    assert found.fields == kept


def learned(path: Path, row: dict, **options) -> Row:
    (found,) = TrainingFile(save(path / "a.json", [row]), **options).demonstrations()
    return found


TURNS = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
SAID = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "kept", "notes"),
    [
        ({"conversations": TURNS}, {"messages": SAID}, ["`conversations` are the messages"]),
        (
            {"conversations": TURNS, "system": "Be brief."},
            {"messages": [SYSTEM, *SAID]},
            ["`conversations` are", "`system` is the first turn"],
        ),
        (
            {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7"},
            {"question": "Add the numbers.\n3 and 4", "response": "7"},
            ["`input` stands on the line below", "`instruction` is the question"],
        ),
        (
            {"instruction": "Add 3 and 4.", "input": "", "output": "7", "system": "Be brief."},
            {"question": "Add 3 and 4.", "response": "7", "system": "Be brief."},
            ["`instruction` is the question"],
        ),
        (
            {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
            {"question": "2+2?", "response": "2+2=<<2+2=4>>4\n#### 4"},
            ["`answer` is the response, down to its ####"],
        ),
        (
            {"messages": [{"role": "User", "content": "2+2?"}, {"role": "model", "content": "4"}]},
            {"messages": SAID},
            ["role User is read as user", "role model is read as assistant"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("2+", "2?")]}, SAID[1]]},
            {"messages": SAID},
            ["the text parts of a turn are put together"],
        ),
        ({"messages": [SAID[0], {**SAID[1], "weight": 0}]}, None, ["`weight` of a turn is only"]),
    ],
)
def test_what_people_have_is_learned_from_and_told(tmp_path, row, kept, notes):
    found = learned(tmp_path, row)
    assert found.fields == kept or kept is None
    assert len(found.notes) == len(notes)
    assert all(told.startswith(note) for told, note in zip(found.notes, notes, strict=True))
    assert not found.unread


def test_what_nothing_is_made_of_is_told_with_a_count_and_an_example(tmp_path):
    rows = [{"messages": SAID, "id": i, "tools": [] if i else [{"name": "add"}], "score": 0.5} for i in range(2000)]
    data = TrainingFile(save(tmp_path / "a.jsonl", rows, lines=True))
    counts = "tools (1 row), score (2,000 rows)"
    assert summarize_notes(data.demonstrations()) == [
        f'not read: {counts}; {data.path} line 1 has tools: [{{"name": "add"}}]'
    ]
    both = [{**row, "messages": [{**SAID[0], "role": "USER"}, SAID[1]]} for row in rows[1:3]]
    data = TrainingFile(save(tmp_path / "b.jsonl", both, lines=True))
    assert summarize_notes(data.demonstrations())[0] == f"2 rows: role USER is read as user (first {data.path} line 1)"


def test_alpacas_input_is_used_also_where_its_columns_are_mapped(tmp_path):
    row = {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7"}
    found = learned(tmp_path, row, columns={"question": "instruction", "response": "output"})
    assert found.fields == {"question": "Add the numbers.\n3 and 4", "response": "7"} and not found.unread
    found = learned(tmp_path, {"question": "2+2?", "input": "3", "response": "4"})
    assert found.unread == {"input": "3"}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]},
            "turn 1 has a part of type image_url",
        ),
        ({"role": "user", "content": ["a"]}, 'turn 1 has a part of type "a", and only text is read'),
        ({"role": 3, "content": "a"}, "turn 1: messages must be a list of objects with role and content, both text"),
    ],
)
def test_a_turn_that_is_no_text_is_told_with_its_row(tmp_path, message, sentence):
    with pytest.raises(DirlError, match=f"item 1 {sentence}"):
        learned(tmp_path, {"messages": [message, SAID[1]]})


def test_a_turn_that_only_calls_a_tool_says_nothing(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert learned(tmp_path, {"messages": [SAID[0], call]}).fields["messages"][1]["content"] == ""


def test_a_row_that_answers_nothing_is_no_mistake(tmp_path):
    assert learned(tmp_path, {"prompt": "a", "response": None}).fields == {"prompt": "a", "response": ""}
    rows = [{"question": "a", "ground_truth_answer": value} for value in (None, float("nan"), "1")]
    assert [one.answer for one in problems(save(tmp_path / "b.json", rows))] == ["", "", "1"]


VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 0},
}


@pytest.mark.parametrize(
    ("row", "answer", "notes"),
    [
        ({"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "2+2=<<2+2=4>>4\n#### 4", 1),
        (VERL, "4", 2),
        (VERL | {"reward_model": {"ground_truth": '["4"]'}}, "4", 2),
        (VERL | {"reward_model": {"ground_truth": None}}, "", 2),
    ],
)
def test_the_problems_that_people_have_are_read_and_told(tmp_path, row, answer, notes):
    save_table(tmp_path / "a.parquet", [row])
    for data in (TrainingFile(str(tmp_path / "a.parquet")), ProblemFile("a", str(tmp_path / "a.parquet"))):
        found = data.training_problems() if isinstance(data, TrainingFile) else data.problems()
        assert [(one.question, one.answer) for one in found] == [("2+2?", answer)]
        assert found[0].system == ("Be brief." if "prompt" in row else "")
        assert len(data.remarks()) == notes and not any("not read" in remark for remark in data.remarks())


def test_a_problem_that_is_a_longer_chat_is_told_with_its_row(tmp_path):
    save(tmp_path / "a.json", [VERL | {"prompt": [SAID[0], SAID[1], SAID[0]]}])
    with pytest.raises(DirlError, match="item 1: a problem is one question, not a chat of user, assistant, user"):
        problems(str(tmp_path / "a.json"))


def test_a_number_is_the_answer_that_was_written(tmp_path):
    written = ["0.00001", "2.50", "1e-05", "1E3", "12345678901234567890", "0.1", "-0.0"]
    lines = [f'{{"question": "a", "ground_truth_answer": {number}}}' for number in written]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(f"[{','.join(lines)}]")
    answers = ["0.00001", "2.50", "0.00001", "1000", "12345678901234567890", "0.1", "-0.0"]
    for name in ("a.jsonl", "b.json"):
        assert [one.answer for one in problems(str(tmp_path / name))] == answers


def test_a_number_of_a_table_is_the_answer_by_its_digits(tmp_path):
    values = [(Decimal("2.50"), "2.50"), (0.00001, "0.00001"), (1e22, "10000000000000000000000"), (1e300, "1e+300")]
    for value, answer in values:
        save_table(tmp_path / "a.parquet", [{"question": "a", "ground_truth_answer": value}])
        assert [one.answer for one in problems(str(tmp_path / "a.parquet"))] == [answer]


def test_a_table_of_text_is_read(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffid,question,ground_truth_answer\r\n1,"1,000 + 1\n= ?",1001\r\n\r\n,b,\r\n')
    first, second = read_rows(tmp_path / "a.csv")
    assert first == (
        f"{tmp_path}/a.csv line 2",
        {"id": "1", "question": "1,000 + 1\n= ?", "ground_truth_answer": "1001"},
        (),
        {},
    )
    assert second.location.endswith("a.csv line 5")
    assert [(one.id, one.answer) for one in problems(str(tmp_path / "a.csv"))] == [("1", "1001"), ("a-1", "")]
    (tmp_path / "a.tsv").write_text("question\tground_truth_answer\n2,5 + 1\t3,5\n")
    assert [one.question for one in problems(str(tmp_path / "a.tsv"))] == ["2,5 + 1"]
    (tmp_path / "long.csv").write_text(f"question,response\na,{'b' * 200_000}\n")
    assert len(read_rows(tmp_path / "long.csv")[0].fields["response"]) == 200_000
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert read_rows(tmp_path / "a.csv.gz")[1].fields == second.fields


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("question,response\na,b\nc,d,e\n", "line 3 has 3 cells, and the first line names 2"),
        ("question,question\na,b\n", "has two columns called question: rename one"),
        ('question,response\na,"b\n', "line 2 is not valid CSV"),
        ("question,response\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_a_bad_table_is_told_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DirlError, match=rf"a\.csv {sentence}") as caught:
        read_rows(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_objects_may_be_spread_over_lines(tmp_path):
    text = json.dumps(PROBLEMS[0], indent=2)
    (tmp_path / "a.json").write_text(text)
    assert [row.fields for row in read_rows(tmp_path / "a.json")] == PROBLEMS[:1]
    (tmp_path / "a.json").write_text(f"{text}\n\n{json.dumps(PROBLEMS[1], indent=2)}\n")
    assert [row.location for row in read_rows(tmp_path / "a.json")] == [f"{tmp_path}/a.json line {n}" for n in (1, 6)]
    (tmp_path / "a.json").write_text(f"{text[:-1]}")
    with pytest.raises(DirlError, match="line 1 is not valid JSON"):
        read_rows(tmp_path / "a.json")


def test_the_advice_on_columns_works_as_it_is_typed(tmp_path):
    path = save(tmp_path / "a.json", [{"problem": "2+2?", "final": "4"}])
    mix = Mix("mix", [TrainingFile(path, weight=1)])
    for read, setting in [
        (TrainingFile(path).demonstrations, "'data.columns={question: …}'"),
        (TrainingFile(path).training_problems, "'data.columns={question: …}'"),
        (ProblemFile("a", path).problems, "'bench.columns={question: …}'"),
        (mix.sources[0].demonstrations, "'columns: {question: …}'"),
    ]:
        with pytest.raises(DirlError) as caught:
            read()
        assert str(caught.value).endswith(f"map yours (problem, final) with {setting}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = [f"data.path={path}", "data.columns={question: problem, response: final}"]
        (found,) = build(compose("sft", ["data=file", *words]).data).demonstrations()
        assert found.fields == {"question": "2+2?", "response": "4"}
        words = [f"bench.path={path}", "bench.columns={question: problem, ground_truth_answer: final}"]
        assert build(compose("eval", ["bench=file", *words]).bench).problems()[0].answer == "4"


def test_the_rows_of_the_page_are_read_without_a_word(tmp_path):
    page = (ROOT / "docs/data.md").read_text()
    rows = [json.loads(line) for line in page.split("```json\n")[1].split("```")[0].splitlines()]
    found = [learned(tmp_path, row) for row in rows[:3]]
    assert [row.fields.keys() for row in found] == [{"messages"}, {"question", "response", "system"}, rows[2].keys()]
    assert [row.unread for row in found] == [{}, {}, {}] and found[0].fields["messages"][0] == SYSTEM
    assert problems(save(tmp_path / "b.json", rows[3:]))[0].answer == "4"


def test_a_mix_has_its_sources_with_their_weights_and_asks_them_in_turn(tmp_path):
    rows = [{"question": f"{i}?", "ground_truth_answer": str(i)} for i in range(6)]
    first = TrainingFile(save(tmp_path / "a.json", rows[:4]), held_out=3, weight=0.7)
    second = TrainingFile(save(tmp_path / "b.json", rows[4:]), "second", held_out=1, weight=0.3)
    mix = Mix("mix", [first, second])
    sources, weights = sources_of(mix)
    assert ([source.name for source in sources], weights) == ([first.path, "second"], [0.7, 0.3])
    assert [int(one.answer) // 4 for one in mix.problems()] == [0, 1, 0, 0]
    assert sources_of(first) == ([first], [1.0])


def test_a_mix_of_nothing_is_told():
    with pytest.raises(DirlError, match=r"data.sources must name at least one file"):
        Mix("mix", [])


def test_sources_of_a_mix_are_told_apart_by_name():
    with pytest.raises(DirlError, match=r"two of data.sources go by the same name: give each a name="):
        Mix("mix", [TrainingFile("a.json"), TrainingFile("a.json", split="test")])
    assert Mix("mix", [TrainingFile("a.json"), TrainingFile("a.json", "b")]).sources[0].name == "a.json"
