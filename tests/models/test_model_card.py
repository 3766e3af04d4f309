"""The card of a saved model: a header that the Hub reads, and all that the next person needs."""

from pathlib import Path

import httpx
import pytest
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from dirl_cli.commands.sft import run
from dirl_cli.errors import DirlError
from dirl_cli.models.model_card import adapter_card, format_setting, model_card, repositories
from dirl_cli.models.sdar import SDARConfig
from tests.helpers.sft_runs import config

RECIPE = {
    "data": {"_target_": "dirl_cli.data.files.File", "path": "lab/problems", "columns": None},
    "optim": {"_target_": "dirl_cli.training.optim.AdamW", "lr": 1e-5, "betas": [0.9, 0.95]},
    "steps": 100,
}


def card(**changed: object) -> str:
    given: dict = {
        "title": "sums",
        "repository": None,
        "summary": "sdar8b, fine-tuned on sums.",
        "base": "lab/base",
        "recipe": RECIPE,
        "metrics": {"loss": [3.0, 0.52345, 0.6], "greedy_accuracy": []},
        "decoding": {"block_size": 4, "mask_token_id": 151669},
        "config": SDARConfig(),
    }
    return model_card(**(given | changed))


def header(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_the_header_tells_the_hub_what_the_model_is_and_comes_from():
    assert header(card()) == {
        "base_model": "lab/base",
        "datasets": ["lab/problems"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["block-diffusion", "dirl"],
    }


def test_the_card_tells_how_the_model_was_made_and_how_good_it_was():
    lines = card().splitlines()
    assert "# sums" in lines and "sdar8b, fine-tuned on sums." in lines
    assert "| data | File(path=lab/problems) |" in lines
    assert "| optim | AdamW(lr=1e-05, betas=[0.9, 0.95]) |" in lines
    assert "| loss | 0.6 | 0.5234 | 3 |" in lines
    assert not any("greedy_accuracy" in line for line in lines)
    assert "| mask_token_id | 151669 |" in lines
    assert any(line.startswith("dirl 0.") and "transformers 5." in line for line in lines)


def test_the_card_names_the_repository_where_the_model_goes_and_else_its_own_directory():
    assert 'AutoModelForCausalLM.from_pretrained("lab/new", dtype="auto")' in card(repository="lab/new")
    assert "dirl generate model=lab/new " in card(repository="lab/new")
    assert "dirl generate model=. " in card()


def test_the_card_tells_where_a_token_is_predicted_and_what_else_loads_the_weights():
    assert "they are not shifted. Where dirl is not installed, `Qwen3ForCausalLM` loads\nthe same" in card()
    converted = card(config=LlamaConfig(logit_shift=True))
    assert "those of the token\nat the next one, as in a causal model.\n" in converted
    assert "Qwen3" not in converted and "import dirl_cli" not in converted


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"path": "lab/base", "block_size": None, "mask_token_id": None}, "model=lab/base"),
        ({"path": "lab/base", "block_size": 8, "mask_token_id": None}, "model=lab/base model.block_size=8"),
        (
            {"path": "lab/causal", "block_size": 4, "logit_shift": False},
            "model=from_causal model.path=lab/causal model.block_size=4 model.logit_shift=False",
        ),
    ],
)
def test_the_card_of_an_adapter_loads_the_model_as_it_was_loaded(model, words):
    assert f"\ndirl eval {words} model.adapter=.\n" in adapter_card("sums", "tuned.", model, RECIPE)


def test_what_was_not_measured_has_no_heading():
    assert "## Metrics" not in card(metrics={})


def test_a_path_of_this_machine_shows_its_last_name_only_and_a_bar_does_not_break_the_table():
    text = card(base="/home/ada/secret/base", recipe={"data": {"path": "/home/ada/sums.json"}, "asked": "a|\nb"})
    assert "secret" not in text and "base_model" not in header(text) and "datasets" not in header(text)
    assert "| data | path=sums.json |" in text
    assert "| asked | a\\| b |" in text
    assert format_setting(("x", 1, 0.123456)) == "[x, 1, 0.1235]"


def test_a_file_of_this_name_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/sums.json").touch()
    settings = [{"path": "data/sums.json"}, {"path": "lab/sums"}, {"text": "either/or not"}]
    assert list(repositories(settings)) == ["lab/sums"]


def test_the_licence_and_origin_of_a_base_model_are_passed_on(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: lab/first\ntags: [x]\n---\n# Base\n")
    assert {key: header(card(base=str(tmp_path)))[key] for key in ("license", "base_model")} == {
        "license": "mit",
        "base_model": "lab/first",
    }
    snapshot = tmp_path / "hub/models--lab--base/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert header(card())["license"] == "apache-2.0"
    assert header(card())["base_model"] == "lab/base"


@pytest.mark.parametrize("readme", ["---\n[\n---\n", "---\n- a list\n---\n", "no header", "\xff"])
def test_a_base_model_with_a_broken_card_is_no_obstacle(tmp_path, readme):
    (tmp_path / "README.md").write_bytes(readme.encode("latin-1"))
    assert "license" not in header(card(base=str(tmp_path)))


def test_a_model_is_safe_with_its_card_when_it_cannot_be_pushed(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("dirl_cli.models.save.create_repo", refuse)
    out = tmp_path / "run"
    with pytest.raises(
        DirlError, match=f"the model is safe in {out / 'model'}, but not on the Hub .no route.: push it"
    ):
        run(config("push_to_hub=lab/new", "steps=2", "eval_problems=0"), out)
    text = (out / "model/README.md").read_text()
    assert "tiny, fine-tuned on arithmetic with `dirl sft`." in text
    assert "| steps | 2 |" in text and "| block_size | 4 |" in text and "| validation_loss | " in text
    assert not [file for file in out.rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]


def test_a_checkout_that_is_only_on_the_path_has_a_card_too(monkeypatch):
    monkeypatch.setattr("dirl_cli.models.model_card.PACKAGES", ("torch", "nobody-has-this"))
    assert any(
        line.startswith("torch 2.") and line.endswith("nobody-has-this of a checkout") for line in card().splitlines()
    )
