"""A run as one page of HTML, which asks for nothing and runs nothing, whatever is in the run."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.overview.answers import answers_to_read
from dirl_cli.overview.page import page_of, write_page
from dirl_cli.overview.summary import read_run
from tests.helpers.command_line import dirl
from tests.helpers.run_directories import RL, make_evaluation, make_run

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"


class Page(HTMLParser):
    """The tags of a page, with their attributes; those that are not closed are an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def answer(problem, correct, text="It is 4.", **more):
    return {"problem": problem, "question": "2+2?", "answer": "4", "completion": text, "correct": correct, **more}


def write_rollouts(run, **by_step):
    (run / "rollouts").mkdir()
    for name, rows in by_step.items():
        file = run / "rollouts" / f"{name.replace('_', '-')}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_page_has_curves_answers_settings_and_environment(tmp_path):
    run = make_run(tmp_path / "a")
    write_rollouts(run, step_000001=[answer("p", False, reward=0.25)], step_000004=[answer("p", True, reward=1.0)])
    text = page_of(read_run(run), ["algo=grpo"])
    page = Page(text)
    titles = re.findall(r"<figcaption>([\w ]+)", text)
    assert titles[:2] == ["Accuracy ", "Reward "] and "Step 1" in text and "Step 4" in text
    for part in ("algo=grpo", "It is 4.", "reward 0.25", "torch", "problems: 16", "finished · dirl rl, step 4 of 4"):
        assert part in text, part
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(titles)


def test_a_page_asks_for_nothing_and_runs_nothing_whatever_an_answer_says(tmp_path):
    run = make_run(tmp_path / "<b>a")
    write_rollouts(run, step_000001=[answer(HOSTILE, False, HOSTILE) | {"question": HOSTILE, "answer": HOSTILE}])
    text = page_of(read_run(run), [HOSTILE])
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "b"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "onerror", "onclick"}
    assert "url(" not in text and "@import" not in text and "\x1b" not in text


def test_an_evaluation_has_its_subsets_and_answers_right_and_wrong(tmp_path):
    run = make_evaluation(tmp_path / "a")
    card = json.loads((run / "eval_card.json").read_text())
    (run / "eval_card.json").write_text(json.dumps(card | {"subsets": {"hard": {"accuracy": 0.125}, "odd": 3}}))
    with (run / "answers.jsonl").open("a") as file:
        file.write(json.dumps({"problem": "q", "text": "five", "correct": False}) + '\n{"torn')
    text = page_of(read_run(run), [])
    assert "<th>hard</th>" in text and "12.5 %" in text
    assert text.index("<h3>Wrong</h3>") < text.index("five") < text.index("<h3>Right</h3>")


def test_hardly_anything_is_enough_for_a_page(tmp_path):
    run = make_run(tmp_path / "a", steps=0, saved=0, finished=False)
    write_rollouts(run, step_x=[answer("p", True)])
    for name in ("config.yaml", "environment.json"):
        (run / name).write_text("[")
    Page(page_of(read_run(run), []))


def test_of_each_problem_a_right_and_a_wrong_answer_are_shown(tmp_path):
    run = make_run(tmp_path / "a")
    rows = [answer(f"p{i}", correct) for i in range(9) for correct in (True, True, False, False)]
    write_rollouts(run, step_000002=[*rows, {"problem": 3, "completion": "x" * 9999}])
    [(heading, shown)] = answers_to_read(run).items()
    assert heading == "Step 2" and [a.is_correct for a in shown] == [True, False] * 4


def test_a_long_run_is_a_page_of_a_megabyte_at_most_in_a_second(tmp_path):
    metrics = dict.fromkeys(("reward", "accuracy", "length", "entropy", *(f"m{i}" for i in range(20))), 0.123456)
    run = make_run(tmp_path / "a", steps=4000, metrics=metrics)
    began = time.process_time()
    text = page_of(read_run(run), [])
    assert time.process_time() - began < 3
    assert len(text) < 1_000_000


def test_report_writes_the_page_into_the_run_or_where_it_is_told(here):
    run = make_run(Path("runs/rl/a"))
    result = dirl("runs", "report", "rl/a")
    assert result.exit_code == 0 and result.output == "runs/rl/a/report.html\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert dirl("runs", "report", "rl/a", "--to", "pages/a.html").output == "pages/a.html\n"
    Path("file").touch()
    for unwritable in ("file/a.html", "pages"):
        with pytest.raises(DirlError, match=f"{unwritable} cannot be written .*: give another file with --to$"):
            write_page(read_run(run), [], Path(unwritable))


def test_no_secret_is_on_the_page(tmp_path):
    run = make_run(tmp_path / "a", settings=RL | {"rollout": {"url": "http://me:hunter2@host:1"}})
    page = page_of(read_run(run), [])
    assert "http://***@host:1" in page and "hunter2" not in page
