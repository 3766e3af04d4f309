"""`dirl view` writes a page of answers, or a picture of one, and says what is missing."""

import base64
import gzip
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.command_line import dirl, refusal
from tests.helpers.shown_answers import completions_of, evaluation_of, run_of
from tests.helpers.small import small_lm


@pytest.fixture
def run(here) -> Path:
    """A finished run, model and all."""
    small_lm().save(here / "words" / "model")
    return run_of(Path("words"))


def payload_in(file: str) -> dict:
    [packed] = re.findall(r'id="payload">([^<]+)<', Path(file).read_text())
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_a_run_becomes_a_page_in_runs_whose_path_is_printed(run):
    result = dirl("view", "words")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"4 answers in runs/view/words.html \([\d.]+ kB\): open it in a browser\n", result.stdout)
    data = payload_in("runs/view/words.html")
    assert (data["title"], len(data["answers"])) == ("words", 4)
    assert data["command"] == "dirl view words limit=10000"


def test_several_paths_are_side_by_side_and_one_may_have_an_equals_sign_in_its_name(here):
    evaluation_of(here / "threshold=0.5")
    evaluation_of(here / "b", "five")
    result = dirl("view", "threshold=0.5", "b", "to=two.html")
    assert result.exit_code == 0, result.output
    data = payload_in("two.html")
    assert [source["name"] for source in data["sources"]] == ["threshold=0.5", "b"]
    assert [answer["problem"] for answer in data["answers"]] == [0, 0]


def test_a_limit_tells_what_it_leaves_out(run):
    result = dirl("view", "words", "limit=2", "to=a.html")
    assert "2 more answers of words are left out: raise limit=2, or give serve=true\n" in result.stdout


def test_a_limit_is_no_limit_of_a_page_that_is_served(run):
    assert refusal("view", "words", "limit=2", "serve=true") == (
        "dirl view: limit= leaves answers out of a file and serve=true shows all: leave one of them out"
    )


def test_a_port_is_no_port_of_a_file(run):
    assert refusal("view", "words", "port=1234") == (
        "dirl view: port=1234 is of an address, and a file has none: give serve=true, or leave port out"
    )


def test_completions_are_read_by_the_model_that_they_note_or_that_is_given(here):
    small_lm().save(here / "model_a")
    completions_of(here / "mine")
    assert refusal("view", "mine") == (
        "dirl view: nothing beside mine says which model it is of: give it with model=DIR"
    )
    assert dirl("view", "mine", "model=model_a", "to=a.html").exit_code == 0
    model = {"_target_": "dirl_cli.models.load.SavedModel", "name": "a", "path": "model_a"}
    (here / "mine" / "sampled_from.json").write_text(json.dumps({"model": model}))
    assert dirl("view", "mine/completions.jsonl", "to=b.html").exit_code == 0
    assert payload_in("a.html")["texts"] == payload_in("b.html")["texts"]


def test_a_model_that_is_gone_is_told(here):
    completions_of(here / "mine")
    model = {"_target_": "dirl_cli.models.load.SavedModel", "name": "a", "path": "./gone"}
    (here / "mine" / "sampled_from.json").write_text(json.dumps({"model": model}))
    assert refusal("view", "mine").startswith("dirl view: the model that mine is of cannot be read (./gone is not")


@pytest.mark.parametrize(
    ("note", "torn"), [("sampled_from.json", '{"model": {"na'), ("config.yaml", "model: {path: [")]
)
def test_a_torn_note_of_the_model_is_told(here, note, torn):
    completions_of(here / "mine")
    (here / "mine" / note).write_text(torn)
    assert refusal("view", "mine") == (
        f"dirl view: mine/{note}, which names the model, cannot be read: give the model with model=DIR"
    )


def test_an_answer_is_exported_as_svg_and_as_gif(run):
    result = dirl("view", "words", "number=2", "export=answer.svg")
    assert result.stdout == "answer 2 in answer.svg\n"
    assert Path("answer.svg").read_text().startswith("<svg ")
    assert dirl("view", "words", "number=2", "export=answer.gif").exit_code == 0
    assert Image.open("answer.gif").n_frames == 5
    assert not Path("runs", "view").exists()


def test_what_cannot_be_exported_is_told(run, here):
    assert refusal("view", "words", "export=a.png") == (
        "dirl view: export=a.png: give a name that ends in .gif or .svg"
    )
    assert refusal("view", "words", "number=9", "export=a.svg") == (
        "dirl view: number=9: there are 4 answers, so give one of these"
    )
    evaluation_of(here / "graded")
    assert "an evaluation keeps no tokens" in refusal("view", "graded", "export=a.svg")


def test_a_place_that_cannot_be_written_is_told_with_the_setting_that_names_another(run):
    Path("file").touch()
    for setting in ("to", "export"):
        told = refusal("view", "words", f"{setting}=file/a.gif")
        assert told.startswith("dirl view: file/a.gif cannot be written (")
        assert told.endswith(f": give another file with {setting}=FILE")


def test_nothing_to_look_at_is_told(here):
    assert refusal("view") == "dirl view: say whose answers, such as `dirl view runs/rl/tiny-arithmetic-dipo`"
    assert refusal("view", "nowhere").startswith("dirl view: nowhere is not there: give what `dirl rl`")
