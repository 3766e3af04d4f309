"""Answers served in pieces are those of their files; only this machine's own names and the key are answered."""

import gzip
import json

import pytest
from starlette.testclient import TestClient

from dirl_cli.errors import DirlError
from dirl_cli.viewer import served_answers
from dirl_cli.viewer.answer_sources import files_by_step, kind_of, read_source
from dirl_cli.viewer.page_server import listener_on, page_app
from dirl_cli.viewer.payload import TokenReader, payload
from dirl_cli.viewer.served_answers import AnswerFile, ServedAnswers
from tests.helpers.shown_answers import FIVE, FOUR, Words, completions_of, evaluation_of, run_of


def served(*paths) -> ServedAnswers:
    files = []
    for source, path in enumerate(paths):
        steps = files_by_step(path)
        kind = kind_of(next(iter(steps.values())))
        files += [AnswerFile(source, file, kind, step) for step, file in steps.items()]
    readers = [TokenReader(Words())] * len(paths)
    return ServedAnswers(files, readers, lambda file, number: f"dirl view {file.name} number={number}")


def client_of(answers: ServedAnswers, host: str = "127.0.0.1") -> TestClient:
    return TestClient(page_app("<p>page", answers, "key"), f"http://{host}")


def all_facts(answers: ServedAnswers) -> list[dict]:
    return [facts for piece in answers.pieces for facts in json.loads(gzip.decompress(piece))]


def test_pieces_and_whole_answers_are_what_a_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(served_answers, "PIECE", 3)
    run, completions = run_of(tmp_path / "run", steps=3), completions_of(tmp_path / "c", answers=(FOUR, FIVE))
    evaluation = evaluation_of(tmp_path / "e")
    paths = (run, completions, evaluation)
    answers = served(*paths)
    assert [len(json.loads(gzip.decompress(piece))) for piece in answers.pieces] == [3, 3, 3]

    data = payload([read_source(path, 100) for path in paths], [TokenReader(Words())] * 3, "")
    whole = answers.whole(range(9))
    for facts, one, other in zip(all_facts(answers), whole["answers"], data["answers"], strict=True):
        tokens, prompt = other.pop("tokens", None), other.pop("prompt", None)
        asked = data["problems"][other.pop("problem")]
        del facts["problem"], facts["group"], other["group"]
        assert {name: one.get(name, facts.get(name)) for name in other} == other
        assert one["asked"] == asked
        if tokens is not None:
            assert [whole["texts"][place] for place in one["tokens"]] == [data["texts"][place] for place in tokens]
            assert one["read"] == data["prompts"][prompt]


def test_the_page_asks_below_its_key_at_this_machines_names_alone(tmp_path):
    answers = served(run_of(tmp_path))
    client = client_of(answers)
    assert client.get("/key/").text == "<p>page"
    assert client.get("/key/facts/0").json() == all_facts(answers)
    assert client.get("/key/excerpts?places=0,1").json() == ["four", "five=four\nfive"]
    assert client.get("/key/answers?places=1").json() == answers.whole([1])
    assert client.get("/key/answers?places=1").json()["answers"][0]["picture"] == "dirl view step-000001.jsonl number=2"
    for path in ("/", "/facts/0", "/other/", "/other/facts/0", "/key/facts/1"):
        assert client.get(path).status_code == 404
    assert client_of(answers, "evil.example").get("/key/facts/0").status_code == 400


def test_what_cannot_be_answered_is_told(tmp_path):
    run = run_of(tmp_path)
    client = client_of(served(run))
    for places in ("99", "-1", "x", "", ",".join(["0"] * 1001)):
        assert client.get(f"/key/answers?places={places}").status_code == 400
    assert client.get("/key/search?words=a&first=x").status_code == 400
    (run / "rollouts" / "step-000002.jsonl").unlink()
    gone = client.get("/key/answers?places=2")
    assert gone.status_code == 410 and gone.json()["error"].endswith(
        "cannot be read (No such file or directory): start dirl view again"
    )


def test_a_search_is_answered_in_parts(tmp_path, monkeypatch):
    answers = served(run_of(tmp_path, steps=3))
    assert answers.search("FIVE=", 0) == {"places": [1, 3, 5], "next": None}
    assert answers.search("sum-2", 0) == {"places": [2, 3], "next": None}
    monkeypatch.setattr(served_answers, "SEARCH", -1.0)  # over after each
    assert answers.search("five=", 1) == {"places": [1], "next": 2}


def test_a_port_that_is_taken_is_told():
    with listener_on(0) as taken, pytest.raises(DirlError, match=r"port=.* cannot be listened at .*: give another, or"):
        listener_on(taken.getsockname()[1])
