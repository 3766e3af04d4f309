"""Preference optimisation from end to end on a model of a few thousand parameters."""

import json
import shutil
from math import log
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from dirl_cli.cli.schema import PreferenceConfig
from dirl_cli.commands import dpo
from dirl_cli.dpo.preference import LINKS
from dirl_cli.errors import DirlError
from dirl_cli.models.load import SavedModel
from dirl_cli.ranges import limit_of, types_of
from dirl_cli.rollout.storage import read_rollout
from tests.helpers import rl_runs
from tests.helpers.rl_runs import ARITHMETIC, composed, lines, save_sharp_model, weights

SMALL = (
    "~experiment",
    "model=path",
    "dpo.pairing=best_worst",
    "optim.lr=1e-2",
    "steps=6",
    "batch_size=4",
    "save_every=2",
    "log_every=1",
    "eval_problems=2",
    "decoding.max_new_tokens=12",
    "device=cpu",
)
UPDATE = ("loss", "reward_margin", "chosen_logprob", "grad_norm", "validation_loss")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def rollouts(model, tmp_path_factory) -> Path:
    """Twenty-four answers of the model to eight problems; a random model's are preferred for ending early."""
    out = tmp_path_factory.mktemp("rollouts")
    rl_runs.run(rl_runs.config(model, "rl.rollout_only=true", "rl.filter=none", "eval_problems=0"), out)
    return out


def config(model: Path, *words: str):
    own = () if any(word.startswith("data=") for word in words) else ARITHMETIC
    return composed("dpo", *SMALL, *own, f"model.path={model}", *words)


def on_trace(rollouts: Path, *words: str) -> list[str]:
    return [f"dpo.pairs_from={rollouts}", "likelihood=trace", "dpo.held_out=2", "eval_every=3", *words]


def run(cfg, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    dpo.run(cfg, out)


@pytest.fixture(scope="module")
def finished(model, rollouts, tmp_path_factory) -> Path:
    """Six steps on the exact trace, evaluated before, after the third and the last."""
    out = tmp_path_factory.mktemp("finished")
    run(config(model, *on_trace(rollouts, "keep_checkpoints=0")), out)
    return out


def updates(out: Path) -> list[dict[str, float]]:
    return [{name: line[name] for name in UPDATE if name in line} for line in lines(out)]


def test_it_begins_at_the_reference_and_margins_rise(finished):
    before, first, *_, last = lines(finished)
    assert first["loss"] == pytest.approx(log(2), abs=1e-4)
    assert before["validation_loss"] == pytest.approx(log(2), abs=1e-4)
    assert last["reward_margin"] > first["reward_margin"] + 0.1
    assert last["loss"] < first["loss"] - 0.1
    assert last["reward_accuracy"] > 0.7


def test_every_step_is_on_record_and_evaluations_where_they_were_asked_for(finished):
    assert [line["step"] for line in lines(finished)] == [0, 1, 2, 3, 4, 5, 6]
    measured = {"validation_loss", "validation_reward_accuracy", "validation_reward_margin", "greedy_accuracy"}
    assert [line["step"] for line in lines(finished) if measured <= line.keys()] == [0, 3, 6]
    named = {"loss", "reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward", "chosen_logprob"}
    assert named | {"rejected_logprob", "grad_norm", "lr", "epoch", "tokens_per_s"} < lines(finished)[1].keys()
    for line in lines(finished)[1:]:
        assert line["reward_margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"], abs=1e-4)
    with Image.open(finished / "dpo.png") as picture:
        assert picture.width == 1440


def test_what_it_leaves_loads_as_a_model(finished, model):
    changed = SavedModel("left", str(finished / "model")).load("float32", "cpu").model.state_dict()
    before = SavedModel("before", str(model)).load("float32", "cpu").model.state_dict()
    assert any((changed[name] - before[name]).abs().max() > 1e-3 for name in before)
    card = (finished / "model/README.md").read_text()
    assert "aligned on the answers of" in card and "`dirl dpo`" in card


def test_a_run_that_is_taken_up_again_ends_in_the_same_bytes(model, rollouts, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    run(config(model, *on_trace(rollouts, "keep_checkpoints=0")), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    assert updates(tmp_path / "run") == updates(finished)


def test_a_run_whose_pairs_changed_is_refused(model, rollouts, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    shutil.copytree(rollouts, tmp_path / "other")
    (tmp_path / "other/rollouts/step-000004.jsonl").unlink()
    with pytest.raises(DirlError, match=r"the rows of .*other are not those that this run began with"):
        run(config(model, *on_trace(tmp_path / "other")), tmp_path / "run")


def test_another_command_s_checkpoint_is_refused(model, rollouts, finished, tmp_path):
    resume = f"resume={rollouts}/checkpoints/step-000004"
    with pytest.raises(DirlError, match=r"is a checkpoint of `dirl rl`, which `dirl dpo` cannot resume"):
        run(config(model, *on_trace(rollouts, resume)), tmp_path)


@pytest.mark.parametrize("words", [["micro_rows=null"], ["row_tokens=64"]])
def test_rows_and_micro_batches_change_nothing(model, rollouts, finished, tmp_path, words):
    run(config(model, *on_trace(rollouts, *words)), tmp_path)
    for ours, theirs in zip(updates(tmp_path), updates(finished), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_an_adapter_is_measured_against_the_model_without_it(model, rollouts, tmp_path):
    pytest.importorskip("peft")
    run(config(model, *on_trace(rollouts, "peft=lora")), tmp_path)
    first, *_, last = lines(tmp_path)[1:]
    assert first["loss"] == pytest.approx(log(2), abs=1e-4)
    assert last["reward_margin"] > 0.05
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_term_of_fine_tuning_holds_the_chosen_answers_up(model, rollouts, finished, tmp_path):
    run(config(model, *on_trace(rollouts, "dpo.sft_weight=2")), tmp_path)
    assert lines(tmp_path)[-1]["chosen_logprob"] > lines(finished)[-1]["chosen_logprob"]
    last = lines(tmp_path)[-1]
    assert last["loss"] == pytest.approx(last["preference_loss"] + 2 * last["sft_loss"], rel=1e-4)


def test_answers_of_a_run_can_be_scored_by_their_evidence_bound(model, rollouts, tmp_path):
    run(config(model, f"dpo.pairs_from={rollouts}", "likelihood.draws=2", "eval_problems=0"), tmp_path)
    assert lines(tmp_path)[-1]["reward_margin"] > 0.1


def test_a_dry_run_shows_pairs_and_what_they_take(model, rollouts, tmp_path, capsys):
    run(config(model, *on_trace(rollouts, "dry_run=true")), tmp_path)
    shown = capsys.readouterr().out
    assert f"{rollouts}, chosen, example 1" in shown and f"{rollouts}, rejected, example 1" in shown
    assert "reference model" in shown and "after 6 steps: " in shown
    assert not (tmp_path / "model").exists()


# Pairs of texts

QUESTIONS = [{"question": f"{n}+1?", "chosen": str(n + 1), "rejected": f"no, {n}"} for n in range(12)]
ASK, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


def file_of(directory: Path, rows: list[dict]) -> str:
    path = directory / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


def test_pairs_of_a_file_are_learned_by_their_evidence_bound(model, tmp_path, capsys):
    rows = [
        *QUESTIONS,
        {"question": "2?", "chosen": "2", "rejected": "2"},
        {"question": "3?", "chosen": "", "rejected": "2"},
    ]
    words = ("data=file", file_of(tmp_path, rows), "data.held_out=2", "likelihood.draws=2", "eval_problems=0")
    run(config(model, *words), tmp_path / "out")
    shown = capsys.readouterr().out
    assert "1 left out that have an empty answer" in shown and "1 left out that prefer an answer to itself" in shown
    assert lines(tmp_path / "out")[1]["loss"] == pytest.approx(log(2), abs=1e-4)
    assert lines(tmp_path / "out")[-1]["reward_margin"] > 0.1
    assert "validation_reward_accuracy" in lines(tmp_path / "out")[-1]


def test_a_conversation_without_a_last_answer_is_left_out_and_counted(model, tmp_path, capsys):
    rows = [
        *QUESTIONS,
        {"chosen": [ASK, ANSWER], "rejected": None},
        {"prompt": [ASK, ANSWER, ASK], "chosen": [ANSWER], "rejected": ""},
    ]
    run(config(model, "data=file", file_of(tmp_path, rows), "data.held_out=0", "dry_run=true"), tmp_path / "out")
    assert "2 left out that have an empty answer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        (QUESTIONS, ["likelihood=trace"], "are texts, of which nobody knows how they came about: give likelihood=elbo"),
        (
            [{"question": "2?", "response": "2"}],
            [],
            "line 1 has no chosen: a pair has chosen and rejected, .*map yours",
        ),
        ([{"chosen": "2", "rejected": "3"}], [], "line 1 has no question"),
        (
            [{"question": "2?", "chosen": "2", "rejected": "2"}],
            [],
            "no pair of .* is left to learn from: raise max_tokens, or give other data",
        ),
        (QUESTIONS, ["max_tokens=4"], "no pair of .* is left to learn from"),
        (QUESTIONS, ["keep_best=validation_loss"], "keep_best=validation_loss"),
    ],
)
def test_a_file_that_has_no_pairs_is_refused(model, tmp_path, rows, words, sentence):
    with pytest.raises(DirlError, match=sentence):
        run(config(model, "data=file", file_of(tmp_path, rows), "eval_problems=0", *words), tmp_path / "out")


def test_embedded_problems_are_no_pairs(model, tmp_path):
    with pytest.raises(DirlError, match=r"data=arithmetic holds no pairs: give a file of .* with dpo.pairs_from=DIR"):
        run(config(model), tmp_path)


def test_the_links_of_the_config_are_those_there_are():
    assert list(limit_of(types_of(PreferenceConfig)["link"]).words) == list(LINKS)


def test_pairs_are_of_the_rollouts_own_tokens(rollouts):
    answers = [record for file in sorted(rollouts.glob("rollouts/*")) for record in read_rollout(file)]
    assert len(answers) == 24 and all(record.reward is not None for record in answers)
