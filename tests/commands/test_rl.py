"""Reinforcement from end to end on a model of a few thousand parameters."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dirl_cli.cli.schema import slug
from dirl_cli.commands import sft
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.load import SavedModel
from dirl_cli.rl.reporting import why_without_signal
from dirl_cli.rollout.storage import Record, read_rollout
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.stored_checkpoint import sha256
from dirl_cli.types import Problem, Trajectory
from tests.helpers.rl_runs import (
    ARITHMETIC,
    SMALL,
    composed,
    config,
    lines,
    run,
    save_sharp_model,
    updates,
    weights,
)
from tests.helpers.small import paid_by_the_letter, published_vocabulary


def apart(out: Path, other: Path) -> float:
    """The largest difference between the weights of two runs, or of a run and the model in a directory."""
    ours = load_file(out / "model/model.safetensors")
    theirs = load_file((other / "model" if (other / "model").exists() else other) / "model.safetensors")
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """Four steps, evaluated before, after the second and after the last."""
    out = tmp_path_factory.mktemp("finished")
    run(config(model, "eval_every=2"), out)
    return out


def test_every_step_is_on_record_and_evaluations_before_between_and_after(finished):
    assert [line["step"] for line in lines(finished)] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines(finished) if "greedy_accuracy" in line] == [0, 2, 4]
    assert [line["step"] for line in lines(finished) if "seconds/evaluation" in line] == [0, 2, 4]
    wanted = {"reward", "kept_reward", "accuracy", "length", "tokens_per_forward", "kept", "loss", "entropy", "lr"}
    wanted |= {"mismatch_mean", "mismatch_max", "mismatch_kl", "seconds/rollout", "reward/soft_overlong"}
    assert wanted < lines(finished)[1].keys()


def test_sampler_and_trainer_agree_on_the_log_probs(finished):
    assert all(line["mismatch_max"] < 1e-4 for line in lines(finished) if "mismatch_max" in line)
    assert any("mismatch_max" in line for line in lines(finished))


def test_the_model_changes_and_loads_as_published_models_do(finished, model):
    assert apart(finished, model) > 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.mask_token_id == loaded.config.mask_token_id


def test_rollouts_hold_every_answer_with_its_reward(finished):
    for step in range(1, 5):
        records = read_rollout(finished / f"rollouts/step-{step:06d}.jsonl")
        assert records and len(records) % 3 == 0
        for record in records:
            assert record.learned_from == (record.advantage is not None)
            assert record.trajectory.reveal_step and "soft_overlong" in record.parts
        learned_from = [record for record in records if record.learned_from]
        assert lines(finished)[step]["groups"] == len(learned_from) / 3


def test_the_curves_are_drawn(finished):
    with Image.open(finished / "rl.png") as picture:
        assert picture.width == 1440


def test_a_finished_run_says_so(finished, model, capsys):
    before = weights(finished)
    run(config(model, "eval_every=2"), finished)
    assert f"{finished} is finished: run `dirl eval model={finished}/model`" in capsys.readouterr().out
    assert weights(finished) == before


def test_what_the_run_shows(model, tmp_path, capsys):
    run(config(model, "steps=2"), tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["40 training problems of arithmetic", "2 held-out problems"]
    assert re.fullmatch(r"before · greedy accuracy .*%", shown[2])
    [summary] = [line for line in shown if line.startswith("step 1/2 · ")]
    assert "reward -" in summary and "accuracy 0%" in summary and len(summary) <= 100
    assert any("│ question" in line or "┃ question" in line for line in shown)
    assert any(re.fullmatch(r"step 2/2 · greedy accuracy .*%", line) for line in shown)
    assert f"the model is in {tmp_path}/model: run `dirl eval model={tmp_path}/model`" in shown


def test_without_problems_to_evaluate_nothing_is_said_of_them(model, tmp_path, capsys):
    run(config(model, "steps=1", "eval_problems=0"), tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert "before" not in capsys.readouterr().out


def test_a_run_that_stopped_goes_on_to_the_same_bytes(finished, model, tmp_path, capsys):
    run(config(model, "eval_every=2"), tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    run(config(model, "eval_every=2"), tmp_path)
    assert "going on after step 2" in capsys.readouterr().out
    assert weights(tmp_path) == weights(finished)
    assert updates(tmp_path) == updates(finished)


def test_a_run_that_never_saved_is_told_once(model, tmp_path):
    run(config(model, "steps=2"), tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints")
    run(config(model, "steps=2"), tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_a_replay_learns_the_same_without_sampling(finished, model, tmp_path):
    run(config(model, "eval_every=2", f"rl.replay={finished}"), tmp_path)
    assert weights(tmp_path) == weights(finished)
    assert updates(tmp_path) == updates(finished)
    assert not (tmp_path / "rollouts").exists()


def test_a_replay_may_reward_anew(finished, model, tmp_path):
    words = ("eval_problems=0", f"rl.replay={finished}", "rl.rescore=true")
    run(config(model, *words), tmp_path / "same")
    assert weights(tmp_path / "same") == weights(finished)
    run(config(model, *words, "+reward.weights={soft_overlong: -1.0}"), tmp_path / "opposite")
    assert weights(tmp_path / "opposite") != weights(finished)
    name = "rollouts/step-000002.jsonl"
    before = [r for r in read_rollout(finished / name) if r.learned_from]
    after = [r for r in read_rollout(tmp_path / "opposite" / name) if r.learned_from]
    assert [r.trajectory for r in after] == [r.trajectory for r in before]
    assert [r.reward for r in after] == [-r.reward for r in before]
    assert [r.advantage for r in after] == pytest.approx([-r.advantage for r in before])


# Two answers to each of three problems, most of which end at once, so that some groups are all the same.
SURPLUS = ("rl.problems=3", "rl.group_size=2", "rl.max_rounds=4", "eval_problems=0", "save_every=1")
SURPLUS += (f"decoding.stop_token_ids={[2, *range(10, 150)]}", "keep_checkpoints=9")


def surplus(out: Path) -> list[list]:
    """The groups left over after each step."""
    return [json.loads(file.read_text())["surplus"] for file in sorted(out.glob("checkpoints/*/state.json"))]


def test_the_surplus_is_kept_in_the_checkpoint_and_is_what_the_next_step_begins_with(model, tmp_path):
    run(config(model, *SURPLUS), tmp_path)
    through = weights(tmp_path)
    step, groups = next((step, groups) for step, groups in enumerate(surplus(tmp_path)[:-1], start=1) if groups)
    used = read_rollout(tmp_path / f"rollouts/step-{step + 1:06d}.jsonl")
    assert used[0].trajectory.token_ids == groups[0][0]["token_ids"] and used[0].learned_from
    left = [record for record in read_rollout(tmp_path / f"rollouts/step-{step:06d}.jsonl") if not record.learned_from]
    assert groups[0][0]["token_ids"] in [record.trajectory.token_ids for record in left]
    shutil.rmtree(tmp_path / "model")
    for later in range(step + 1, 5):
        shutil.rmtree(tmp_path / f"checkpoints/step-{later:06d}")
    run(config(model, *SURPLUS), tmp_path)
    assert weights(tmp_path) == through


def test_a_replay_is_the_same_with_surplus_groups_mini_batches_and_epochs(model, tmp_path):
    words = (*SURPLUS, "rl.mini_batches=2", "rl.epochs=2", "optim.lr=1e-3", "seed=4")
    run(config(model, *words), tmp_path / "run")
    assert any(surplus(tmp_path / "run")[:-1])
    assert json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text())["updates"] == 8
    run(config(model, *words, f"rl.replay={tmp_path}/run"), tmp_path / "replay")
    assert weights(tmp_path / "replay") == weights(tmp_path / "run")


def test_rollouts_alone_leave_the_model_as_it_was_and_can_be_learned_from(model, tmp_path, capsys):
    run(config(model, "steps=2", "rl.rollout_only=true"), tmp_path / "run")
    assert "learn from them with `rl.replay=" in capsys.readouterr().out
    assert not (tmp_path / "run/model").exists()
    assert all("loss" not in line and "greedy_accuracy" not in line for line in lines(tmp_path / "run"))
    records = read_rollout(tmp_path / "run/rollouts/step-000002.jsonl")
    assert {record.trajectory.weights_version for record in records} == {0}
    run(config(model, "steps=2", f"rl.replay={tmp_path}/run"), tmp_path / "replay")
    assert apart(tmp_path / "replay", model) > 1e-3
    compared = ["mismatch_mean" in line for line in lines(tmp_path / "replay")]
    assert compared == [False, True, False]  # what was sampled from weights of another step is not compared


def test_micro_batches_and_rows_change_nothing(finished, model, tmp_path):
    run(config(model, "eval_every=2", "micro_rows=1", "row_tokens=64"), tmp_path)
    for ours, theirs in zip(lines(tmp_path), lines(finished), strict=True):
        for name in {"loss", "grad_norm", "entropy", "ratio"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4, rel=1e-3)


def test_several_updates_per_rollout_take_ratios_against_the_recorded_log_probs(model, tmp_path):
    run(config(model, "rl.epochs=3", "steps=2", "optim.lr=1e-1"), tmp_path)
    first = lines(tmp_path)[1]
    assert abs(first["ratio"] - 1) > 1e-3 and first["clipped"] > 0
    assert first["mismatch_max"] < 1e-4  # of the first update alone


@pytest.mark.parametrize("more", [(), ("rl.correction_cap=2",), ("rl.epochs=2", "rl.correction_cap=2")])
def test_the_trainers_own_log_probs_give_the_same_update_as_the_samplers(model, tmp_path, more):
    sampler = [word for word in more if "correction" not in word]
    run(config(model, "steps=2", *sampler), tmp_path / "sampler")
    run(config(model, "steps=2", "rl.old=trainer", *more), tmp_path / "trainer")
    ours, theirs = lines(tmp_path / "trainer")[1], lines(tmp_path / "sampler")[1]
    for name in ("loss", "grad_norm", "entropy", "ratio"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)


def test_the_forwards_of_old_and_reference_log_probs_have_a_phase_of_their_own(finished, model, tmp_path, monkeypatch):
    assert not any("seconds/logprobs" in line for line in lines(finished))  # whose old ones are the sampler's
    forward = LogprobModel.forward

    def slow(scorer, rows):
        if not torch.is_grad_enabled():
            time.sleep(0.2)
        return forward(scorer, rows)

    monkeypatch.setattr(LogprobModel, "forward", slow)
    run(config(model, "steps=1", "rl.old=trainer", "rl.epochs=2", "algo.beta=0.1", "eval_problems=0"), tmp_path)
    [line] = lines(tmp_path)
    assert line["seconds/logprobs"] >= 0.4 and line["seconds/rows"] < 0.2


@pytest.mark.parametrize("algo", [p.stem for p in sorted((conf_dir() / "algo").glob("*.yaml")) if p.stem != "dipo"])
def test_every_algorithm_takes_steps(model, tmp_path, algo):
    words = ["steps=2", "eval_problems=0", "show_every=0"]
    if algo == "opd":
        words.append(f"algo.teacher={save_sharp_model(tmp_path / 'teacher', seed=1)}")
    run(config(model, f"algo={algo}", *words), tmp_path)
    assert apart(tmp_path, model) > 1e-3


@pytest.mark.parametrize(
    ("algo", "every"),
    [pytest.param("dipo", 0, marks=pytest.mark.slow), ("dipo", 2), pytest.param("opsd", 2, marks=pytest.mark.slow)],
)
def test_a_run_that_goes_on_has_the_reference_that_it_had(model, tmp_path, algo, every):
    """The starting model, or one that follows the policy every second update; where it is told the answer, too."""
    words = (f"algo={algo}", "algo.beta=0.5", f"algo.reference_every={every}", "steps=4", "save_every=1")
    run(config(model, *words), tmp_path / "through")
    divergence = [line["kl"] for line in lines(tmp_path / "through") if "kl" in line]
    assert (divergence[0] == pytest.approx(0, abs=1e-9)) == (algo == "dipo") and divergence[-1] > 1e-4
    shutil.copytree(tmp_path / "through", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/model")
    shutil.rmtree(tmp_path / "again/checkpoints/step-000004")
    run(config(model, *words), tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "through")
    assert [line.get("kl") for line in lines(tmp_path / "again")] == [
        line.get("kl") for line in lines(tmp_path / "through")
    ]


@pytest.mark.slow
def test_a_policy_comes_nearer_to_its_teacher_whatever_the_rewards(model, tmp_path):
    teacher = save_sharp_model(tmp_path / "teacher", seed=1)
    words = (f"algo.teacher={teacher}", "rl.filter=none", "rl.problems=8", "steps=16", "eval_problems=0")
    run(config(model, "algo=opd", *words), tmp_path)
    divergences = [line["kl"] for line in lines(tmp_path) if "kl" in line]
    assert divergences[-1] < 0.5 * divergences[0]


def test_an_unfinished_run_refuses_another_teacher_in_the_same_place(model, tmp_path):
    words = ("algo=opd", f"algo.teacher={tmp_path}/teacher", "rl.filter=none", "steps=2", "save_every=1")
    save_sharp_model(tmp_path / "teacher", seed=1)
    run(config(model, *words), tmp_path / "out")
    through = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/model")
    shutil.rmtree(tmp_path / "out/checkpoints/step-000002")
    shutil.move(tmp_path / "teacher", tmp_path / "first")
    save_sharp_model(tmp_path / "teacher", seed=2)
    with pytest.raises(DirlError, match=r"algo.teacher are not those that this run began with: put them back"):
        run(config(model, *words), tmp_path / "out")
    shutil.rmtree(tmp_path / "teacher")
    shutil.move(tmp_path / "first", tmp_path / "teacher")
    run(config(model, *words), tmp_path / "out")
    assert weights(tmp_path / "out") == through


def test_a_teacher_that_has_no_room_for_its_prompt_is_refused_before_the_weights_are_read(model, tmp_path):
    template = "{question} " + 300 * "and so on " + "{answer}"
    words = ("algo=opsd", f"algo.teacher_prompt='{template}'", "dry_run=true")
    with pytest.raises(DirlError, match=r"with algo.teacher_prompt, problem .* and the teacher has"):
        run(config(model, *words), tmp_path)


def test_a_teacher_of_other_blocks_is_refused(model, tmp_path):
    teacher = save_sharp_model(tmp_path / "teacher", block_size=2)
    with pytest.raises(DirlError, match="the teacher has blocks of 2, and the policy of 4"):
        run(config(model, "algo=opd", f"algo.teacher={teacher}"), tmp_path)


def test_a_policy_held_by_its_reference_stays_nearer(model, tmp_path):
    for beta in (0, 50):
        run(config(model, f"algo.beta={beta}", "steps=3", "rl.epochs=2", "optim.lr=1e-3"), tmp_path / str(beta))
    lm, start = [SavedModel("", str(path)).load("float32", "cpu") for path in (tmp_path / "50/model", model)]
    free = SavedModel("", str(tmp_path / "0/model")).load("float32", "cpu")
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        held, loose, first = (one.model(ids).logits.log_softmax(-1) for one in (lm, free, start))
    assert (held - first).abs().mean() < 0.7 * (loose - first).abs().mean()


def test_bf16_keeps_the_parameters_in_float32_and_saves_them_as_bf16(model, tmp_path):
    run(config(model, "dtype=bfloat16", "steps=2", "eval_problems=0"), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    assert len(weights(tmp_path)) < 0.6 * (tmp_path / "checkpoints/step-000002/model.safetensors").stat().st_size
    assert any(1e-5 < line.get("mismatch_max", 0) < 1 for line in lines(tmp_path))


def test_rounds_on_the_best_answers_learn_from_these_alone_and_go_on_to_the_same_bytes(model, tmp_path):
    words = ["algo=raft", "rl.epochs=2", "steps=2", "save_every=1", "eval_problems=0", "keep_checkpoints=0"]
    run(config(model, *words), tmp_path)
    whole, told = weights(tmp_path), updates(tmp_path)
    for step in (1, 2):
        learned = [r for r in read_rollout(tmp_path / f"rollouts/step-{step:06d}.jsonl") if r.learned_from]
        assert {record.advantage for record in learned} == {0.0, 1.0}
    assert json.loads((tmp_path / "checkpoints/step-000002/state.json").read_text())["updates"] == 4

    # Where there is more to learn, from a reference, the others are computed too.
    run(config(model, *words, "algo.beta=0.1", "steps=1"), tmp_path / "all")
    assert lines(tmp_path / "all")[0]["token_forwards"] > lines(tmp_path)[0]["token_forwards"]

    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000002")
    run(config(model, *words), tmp_path)
    assert weights(tmp_path) == whole and updates(tmp_path) == told


def test_a_ranking_is_among_the_rewards_of_every_answer(model, tmp_path):
    run(config(model, "+reward.weights.speed_rank=0.2", "steps=1", "eval_problems=0"), tmp_path)
    assert lines(tmp_path)[-1]["reward/speed_rank"] == 0.0  # whose answers are all wrong
    for record in read_rollout(tmp_path / "rollouts/step-000001.jsonl"):
        assert list(record.parts) == ["accuracy", "soft_overlong", "speed_rank"]
        assert record.reward == record.parts["accuracy"] + record.parts["soft_overlong"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rl.correction_cap=2"], "rl.correction_cap wants rl.old=trainer"),
        (["rl.correction_cap=2", "rl.old=trainer", "algo=diffu_grpo"], "rl.correction_cap wants rl.old=trainer"),
        (["rl.replay=nowhere"], "nowhere holds no step-"),
        (["algo.kl=k4"], "algo.kl=k4: choose one of k1, k2, k3"),
        (["dtype=float16"], "dtype=float16: did you mean"),
        (["device=gpu"], "device=gpu: did you mean cuda"),
        (["attention=flex", "eval_problems=0"], "attention=flex cannot learn on a CPU: leave it at auto"),
        (["resume=nowhere"], "nowhere holds no checkpoint"),
        (["rollout.max_batch=0"], "rollout.max_batch=0: give a whole number of at least 1"),
        (["+reward.weights={acuracy: 1}"], "acuracy"),
        (["+reward.weights={speed_rank: 1}", "rl.filter=accuracy"], "are all right: give rl.filter=reward"),
    ],
)
def test_what_a_user_can_fix_is_told_in_a_sentence(model, tmp_path, words, sentence):
    with pytest.raises(DirlError, match=sentence):
        run(config(model, *words), tmp_path)


def test_problems_that_do_not_fit_are_left_out_and_without_others_nothing_is_learned(model, tmp_path, capsys):
    rows = [{"question": "a" * n, "ground_truth_answer": 1} for n in (3, 5000, 3)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "long.json").write_text(json.dumps(rows[1:2]))
    words = ["data=file", "instruction=none", f"data.path={tmp_path}/data.json", "steps=1"]
    run(config(model, *words), tmp_path / "out")
    reason = "1 left out that have prompts longer than the 1023 tokens there is room for"
    assert capsys.readouterr().out.splitlines()[0] == f"2 training problems of {slug(str(tmp_path))}-data; {reason}"
    with pytest.raises(DirlError, match=r"nothing of .*-long is left to learn from: .* or give other data"):
        run(config(model, *words, f"data.path={tmp_path}/long.json"), tmp_path / "nothing")


def test_neither_command_resumes_from_the_others_checkpoint(finished, model, tmp_path):
    reinforced = finished / "checkpoints/step-000004"
    with pytest.raises(DirlError, match=r"is a checkpoint of `dirl rl`, which `dirl sft` cannot resume: .* model=/"):
        words = ("model=path", f"model.path={model}", *ARITHMETIC, "eval_problems=0", "device=cpu")
        sft.run(composed("sft", *words, f"resume={reinforced}"), tmp_path / "sft")

    tuned = shutil.copytree(reinforced, tmp_path / "step-000004")
    before = sha256(tuned / "state.json")
    state = {"step": 4, "command": "sft", "optimizers": ["AdamW"], "base_fingerprint": None, "skipped": 0}
    (tuned / "state.json").write_text(json.dumps(state))
    sums = (tuned / "SHA256SUMS").read_text()
    (tuned / "SHA256SUMS").write_text(sums.replace(before, sha256(tuned / "state.json")))
    with pytest.raises(DirlError, match=r"is a checkpoint of `dirl sft`, which `dirl rl` cannot resume"):
        run(config(model, f"resume={tuned}"), tmp_path / "rl")


def test_a_reward_that_raises_stops_the_run_with_the_problem_or_its_answers_are_counted(model, tmp_path):
    (tmp_path / "mine.py").write_text("def odd(answer):\n    assert answer.tokens % 2\n    return answer.tokens / 9\n")
    reward = f"+reward.weights={{{tmp_path}/mine.py\\:odd: 1.0}}"
    with pytest.raises(DirlError, match=r"mine.py:odd failed on problem .*: AssertionError"):
        run(config(model, reward), tmp_path / "stopped")
    run(config(model, reward, "reward.on_error=exclude", "steps=2"), tmp_path / "excluded")
    found = lines(tmp_path / "excluded")
    assert sum(line.get("excluded", 0) for line in found) > 0
    for step in (1, 2):
        records = read_rollout(tmp_path / f"excluded/rollouts/step-{step:06d}.jsonl")
        assert all(len(record.trajectory.completion_ids) % 2 for record in records)


HOLDING = '''
"""User code that stops a run in a phase of its choice: where the file `hold-PHASE` lies, until it is killed."""
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from dirl_cli.diffusion.unmasking import low_confidence_dynamic
from dirl_cli.training import optim

def hold(phase):
    flag = Path(__file__).with_name(f"hold-{phase}")
    if flag.exists():
        flag.rename(flag.with_name(f"held-{phase}"))
        time.sleep(60)

def strategy(state):
    hold("rollout")
    return low_confidence_dynamic(state)

def reward(answer):
    hold("reward")
    return -answer.tokens / answer.max_new_tokens

class Held(torch.optim.AdamW):
    def step(self, *args, **kwargs):
        hold("update")
        return super().step(*args, **kwargs)

    def state_dict(self):
        hold("save")
        return super().state_dict()

@dataclass(frozen=True)
class AdamW(optim.AdamW):
    def build(self, model):
        return [Held(model.parameters(), lr=self.lr)]
'''


def dirl(directory: Path, model: Path, *words: str) -> subprocess.Popen:
    """The command in a process of its own, with what is in `directory` importable."""
    small = [word for word in SMALL if not word.startswith(("model=", "+reward.", "reward."))]
    command = [Path(sys.executable).with_name("dirl"), "rl", f"model={model}", *small, *words]
    environment = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.exists():
        if process.poll() is not None:
            pytest.fail(f"the run ended before {file.name} was there:\n{process.stdout.read()}")
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_killed_in_any_phase_goes_on_to_the_same_bytes(model, tmp_path):
    (tmp_path / "holding.py").write_text(HOLDING)
    words = ["+reward.weights={holding.reward: 1.0}", "reward.timeout=60", "optim._target_=holding.AdamW"]
    words += ["decoding.strategy=holding.strategy", "steps=6", "save_every=1", "rl.problems=3", "rl.epochs=2"]
    through = dirl(tmp_path, model, "out=through", *words)
    assert through.wait() == 0, through.stdout.read()

    for step, phase in enumerate(("rollout", "reward", "update", "save", "update", "reward")):
        flag, held = tmp_path / f"hold-{phase}", tmp_path / f"held-{phase}"
        flag.touch()
        process = dirl(tmp_path, model, "out=killed", *words)
        wait_for(held, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        held.unlink()
        if step % 2:  # let a step pass
            process = dirl(tmp_path, model, "out=killed", *words)
            while not list(tmp_path.glob(f"killed/checkpoints/step-{(step + 1) // 2:06d}")):
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
    last = dirl(tmp_path, model, "out=killed", *words)
    assert last.wait() == 0, last.stdout.read()

    killed, through = tmp_path / "killed", tmp_path / "through"
    assert weights(killed) == weights(through)
    assert [line["step"] for line in lines(killed)] == [*range(7)]
    assert updates(killed) == updates(through)
    for step in range(1, 7):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert (killed / name).read_bytes() == (through / name).read_bytes()


@pytest.mark.slow
def test_a_run_of_another_configuration_is_refused(model, tmp_path):
    words = ["+reward.weights={soft_overlong: 1.0}", "+reward.options={soft_overlong: {cache: 12}}", "out=run"]
    first = dirl(tmp_path, model, *words, "steps=1")
    assert first.wait() == 0, first.stdout.read()
    other = dirl(tmp_path, model, *words, "steps=1", "rl.group_size=4")
    assert other.wait() == 1
    told = other.stdout.read()
    title, sentence = told.splitlines()
    assert title == "dirl rl → run"
    assert sentence.startswith("dirl rl: run holds a run with another configuration (rl.group_size: 3 → 4)")
    assert "resume=never" in sentence


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("more", [(), ("rl.old=trainer", "rl.epochs=2", "algo.beta=0.1", "rl.correction_cap=2")])
def test_two_processes_give_what_one_gives(model, tmp_path, more):
    words = ["+reward.weights={soft_overlong: 1.0}", "+reward.options={soft_overlong: {cache: 12}}", *more]
    words += ["steps=3", "rl.problems=5", "micro_rows=1", "row_tokens=128", "optim.lr=1e-3"]
    for out, gpus in (("one", 1), ("two", 2)):
        process = dirl(tmp_path, model, *words, f"out={out}", f"gpus={gpus}")
        told = process.communicate()[0]
        assert process.returncode == 0, told
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if not name.startswith(("time", "seconds/", "mismatch")):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name
    for step in (1, 2, 3):
        answers = {}
        for out in ("one", "two"):
            records = read_rollout(tmp_path / out / f"rollouts/step-{step:06d}.jsonl")
            answers[out] = [(r.problem.id, r.sample, r.trajectory.token_ids, r.learned_from) for r in records]
        assert answers["one"] == answers["two"]


def test_real_problems_with_the_real_tokenizer_are_learned_from_saved_resumed_and_evaluated(shared, tmp_path, capsys):
    model = published_vocabulary(tmp_path / "random", shared)
    words = ["data=file", f"data.path={shared}/data/GSM8K-train-rl.json", "data.held_out=2", "steps=2", "save_every=1"]
    words += ["decoding.max_new_tokens=8", "decoding.stop_token_ids=[]", "row_tokens=512", "dtype=float32"]
    words += ["rl.filter=none", "optim.lr=1e-3"]
    words += [paid_by_the_letter(tmp_path), "+reward.weights.repetition=0.5", "+reward.options={repetition: {n: 1}}"]
    run(config(model, *words), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    run(config(model, *words), tmp_path / "run")
    assert "going on after step 1" in capsys.readouterr().out
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 1, 2] and {"greedy_accuracy", "loss"} <= found[2].keys()
    assert found[1]["mismatch_max"] < 1e-4
    records = read_rollout(tmp_path / "run/rollouts/step-000002.jsonl")
    assert "put your final answer within" in AutoTokenizer.from_pretrained(model).decode(
        records[0].trajectory.prompt_ids
    )
    assert max(token for record in records for token in record.trajectory.token_ids) < 151669
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").convert_tokens_to_ids("<|im_end|>") == 151645


def test_a_run_in_which_no_group_holds_a_signal_says_why_and_has_no_model(model, tmp_path, capsys):
    words = ("steps=6", "rl.problems=1", "rl.filter=none", "rl.max_rounds=1", "eval_problems=0", "show_every=0")
    with pytest.raises(DirlError, match=r"no step changed the model.* no group held a signal; give easier problems"):
        run(config(model, *words, "~reward.weights", "+reward.weights={accuracy: 1}", "~reward.options"), tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("nothing is learned: ")]
    assert len(told) == 1 and "all answers are wrong; give easier problems" in told[0]
    assert not (tmp_path / "model").exists()


def test_why_there_is_nothing_to_learn_is_told_by_what_the_answers_are():
    def group(*answers):
        problem, nothing = Problem("a", "1+1?", "2"), Trajectory([], [], [])
        return [Record(problem, i, "", nothing, reward, {}, correct) for i, (reward, correct) in enumerate(answers)]

    right, wrong, short = (1.0, True), (0.0, False), (0.5, False)
    for answers, why in [
        ([group(right, right)], "all answers are right: give harder problems"),
        ([group(wrong, wrong)], "all answers are wrong; "),
        ([group(wrong, short)], "rl.filter=reward keeps those"),
        ([group(wrong, wrong), group(right, right)], "raise rl.group_size or decoding.temperature"),
    ]:
        assert why in why_without_signal(answers)
