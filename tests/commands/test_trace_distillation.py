"""`dirl sft masking=trace` from end to end, on answers to sums that a tiny model might have given."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from dirl_cli.cli.build import build
from dirl_cli.commands.sft import read_demonstrations, run
from dirl_cli.commands.start import join_processes, shapes_of
from dirl_cli.data.chat import answer_text, encode_question
from dirl_cli.errors import DirlError
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.storage import Record, rollout_path, write_rollout
from dirl_cli.types import Instruction, Problem, Trajectory
from tests.helpers.rl_runs import composed
from tests.helpers.sft_runs import SMALL

OWN = [word for word in SMALL if not word.startswith("data.")]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """Two answers to each of twelve sums, revealed in random orders in blocks of two; the second is wrong."""
    lm = Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu", "sdpa")
    rng, [stop, *_] = Random(0), lm.stop_token_ids
    records = []
    for i in range(12):
        prompt = encode_question(lm.tokenizer, f"What is {i}+{i}?", Instruction())
        for sample in range(2):
            ids = lm.tokenizer(f"{i}+{i}={i + i + sample}", add_special_tokens=False)["input_ids"]
            ids += [stop] * (1 + -(len(prompt) + len(ids) + 1) % 4)
            steps = [rng.randint(1, 2) for _ in ids]
            answer = Trajectory(prompt, ids, steps, [-0.5] * len(ids), "stop", 9, 9, 0, lm.stop_token_ids, 2)
            text = answer_text(lm.tokenizer, answer.completion_ids)
            problem = Problem(str(i), f"What is {i}+{i}?", str(i + i))
            records.append(Record(problem, sample, text, answer, 1.0 - sample, {}, sample == 0))
    directory = tmp_path_factory.mktemp("rl")
    write_rollout(rollout_path(directory / "rollouts", 1), records)
    return directory


def config(rollouts: Path, *words: str):
    return composed("sft", *OWN, "data=rollouts", f"data.path={rollouts}", "masking=trace", *words)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_from_the_right_answers_and_goes_on_to_the_same_bytes(rollouts, tmp_path, capsys):
    words = ("data.held_out=4", "masking.states=drawn", "masking.emphasis=1", "steps=4", "annealing.block_sizes=[2]")
    cfg = config(rollouts, *words, "annealing.share=0.5")
    run(cfg, tmp_path)
    shown = capsys.readouterr().out
    assert "8 training and 4 held-out answers to 12 problems, from 24 answers" in shown
    assert "12 left out that are not correct" in shown and "2 held-out problems" in shown
    assert {"validation_loss", "greedy_accuracy", "denoising_accuracy/1"} <= lines(tmp_path)[-1].keys()
    assert [line["loss"] > 0 for line in lines(tmp_path)[1:]] == [True] * 4

    whole = (tmp_path / "model/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    run(cfg, tmp_path)
    assert "going on after step 2" in capsys.readouterr().out
    assert (tmp_path / "model/model.safetensors").read_bytes() == whole


def test_a_run_does_not_go_on_with_another_order_of_the_same_tokens(rollouts, tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    shutil.copytree(rollouts, mine)
    cfg = config(mine, "steps=2", "save_every=1", "eval_problems=0")
    run(cfg, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints/step-000002")

    file = mine / "rollouts/step-000001.jsonl"
    first, *others = file.read_text().splitlines()
    line = json.loads(first)
    file.write_text("\n".join([json.dumps(line | {"reveal_step": [1] * len(line["reveal_step"])}), *others]) + "\n")
    with pytest.raises(DirlError, match="are not those that this run began with"):
        run(cfg, out)


def test_other_schedules_learn_from_the_answers_too(rollouts, tmp_path):
    run(config(rollouts, "masking=per_block", "steps=1", "eval_problems=0", "data.fastest=1"), tmp_path)
    assert lines(tmp_path)[-1]["loss"] > 0


def ungraded(rollouts: Path, directory: Path) -> Path:
    """The same answers, as nobody has graded them yet."""
    file = directory / "rollouts/step-000001.jsonl"
    file.parent.mkdir(parents=True)
    answers = []
    for line in (rollouts / "rollouts/step-000001.jsonl").read_text().splitlines():
        answer = json.loads(line) | {"reward": None, "correct": False}
        answers.append(json.dumps(answer) + "\n")
    file.write_text("".join(answers))
    return directory


def test_a_run_that_goes_on_learns_from_what_was_graded_at_its_first_start(rollouts, tmp_path, monkeypatch):
    """Whatever a second grading would say, as one that is given up on: it would be other data."""
    mine, out = ungraded(rollouts, tmp_path / "mine"), tmp_path / "out"
    verdicts = [[1.0, 0.0] * 11 + [1.0, None]]
    monkeypatch.setattr("dirl_cli.sft.answer_credits.grade", lambda attempts: verdicts.pop() if attempts else [])
    cfg = config(mine, "steps=2", "save_every=1", "eval_problems=0")
    run(cfg, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints/step-000002")
    run(cfg, out)
    assert len(lines(out)) == 2 and not verdicts


def test_held_out_problems_are_asked_as_the_answers_to_them_were_sampled(rollouts, tmp_path):
    cfg = config(rollouts, "data.held_out=4", "eval_problems=3", "instruction.text=Other words.")
    lm = shapes_of(cfg, build(cfg.model))
    accelerator, progress = join_processes(cfg, ())
    source = build(cfg.data)
    questions = read_demonstrations(
        cfg, tmp_path, source, build(cfg.instruction, Instruction), lm, accelerator, progress
    ).problems
    assert len(questions.problems) == 3
    for problem, prompt in zip(questions.problems, questions.prompts, strict=True):
        assert prompt == encode_question(lm.tokenizer, problem.question, Instruction())


def test_a_plan_shows_the_answers(rollouts, tmp_path, capsys):
    run(config(rollouts, "dry_run=true"), tmp_path)
    shown = capsys.readouterr().out
    assert "example 1" in shown and "What is 0+0?" in shown and "after 6 steps" in shown
    assert "at most" in shown  # as many states as tokens, of which a step may have revealed several
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data=arithmetic"], "which data=arithmetic does not tell: give data=RUN"),
        (["data=rollouts", "data.path=nowhere"], "nowhere is not there: sample answers with"),
        (
            ["annealing.block_sizes=[1]", "annealing.share=0.5"],
            r"line 1 was sampled in blocks of 2, and masking=trace would follow it in blocks of 1: begin with",
        ),
        (
            ["annealing.masked=0.5", "annealing.share=0.5"],
            r"masked=0\.5 shows some of what masking=trace hides",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_before_weights_are_read(rollouts, tmp_path, monkeypatch, words, sentence):
    path = [] if any("data=" in word for word in words) else [f"data.path={rollouts}", "data=rollouts"]
    with pytest.raises(DirlError, match=sentence):
        run(composed("sft", *OWN, "masking=trace", *path, *words), tmp_path)


def test_answers_of_which_none_is_right_leave_nothing(rollouts, tmp_path):
    with pytest.raises(DirlError, match=r"is left to learn from: lower data\.least_reward"):
        run(config(rollouts, "data.least_reward=2"), tmp_path)
