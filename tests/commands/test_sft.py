"""Fine-tuning from end to end on a model of a few thousand parameters."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dirl_cli.commands.sft import run
from dirl_cli.data.order import MixtureOrder, generator
from dirl_cli.diffusion.masking import PerBlock, example
from dirl_cli.errors import DirlError, Stopped
from dirl_cli.files import conf_dir
from dirl_cli.models.tiny import Tiny
from dirl_cli.sft.batches import Noise, NoisedBatches
from dirl_cli.sft.validation import FinetuneEvaluation, cross_entropy, hold_out, metric
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.trainer import Trainer
from tests.helpers.sft_runs import config
from tests.helpers.small import published_vocabulary


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> bytes:
    return (out / "model/model.safetensors").read_bytes()


KILLED = config("steps=6", "save_every=1", "eval_problems=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps, evaluated after the third and the last."""
    out = tmp_path_factory.mktemp("finished")
    run(config("eval_every=3"), out)
    return out


def test_every_step_is_on_record_and_evaluations_where_they_were_asked_for(finished):
    assert [line["step"] for line in lines(finished)] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(finished) if "validation_loss" in line and "greedy_accuracy" in line] == [
        3,
        6,
    ]
    wanted = {"loss", "grad_norm", "lr", "tokens_per_s", "epoch", "seconds/rows", "seconds/optimizer"}
    assert wanted < lines(finished)[1].keys()
    before = {"step", "time", "seconds/evaluation", "validation_loss", *map(metric, (0.25, 0.5, 0.75, 1.0))}
    assert lines(finished)[0].keys() == before
    assert "seconds/evaluation" not in lines(finished)[1]  # which was before it, and is told there
    times = [line["time"] for line in lines(finished)]
    assert times == sorted(times) and abs(times[-1] - (finished / "metrics.jsonl").stat().st_mtime) < 1


def test_tokens_per_second_count_every_row_whose_time_they_count(tmp_path, monkeypatch):
    """Each look at the clock is a second after the one before it, so that only tokens make a difference."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    speeds = []
    for weight in (0, 1):
        run(config("steps=1", "eval_problems=0", f"annealing.causal_weight={weight}"), tmp_path / str(weight))
        speeds.append(lines(tmp_path / str(weight))[-1]["tokens_per_s"])
    assert speeds[1] > 1.3 * speeds[0]


def test_a_run_without_anything_held_out_has_nothing_to_tell_of_it(tmp_path, capsys):
    run(config("steps=1", "eval_problems=0", "data.held_out=0"), tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert not [line for line in shown if line.rstrip().endswith("·") or line.startswith("before")]
    assert "evaluation" not in next(line for line in shown if " went into " in line)


def test_the_loss_falls(finished):
    losses = [line["loss"] for line in lines(finished)[1:]]
    assert losses[-1] < losses[0] - 0.3


def test_the_model_loads_as_published_models_do(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert (model.config.block_size, model.config.hidden_size) == (4, 32)
    assert tokenizer.mask_token_id == model.config.mask_token_id


def test_the_loss_plot_is_drawn(finished):
    with Image.open(finished / "loss.png") as picture:
        assert picture.size == (1440, 1068)


def test_a_finished_run_says_so(finished, capsys):
    before = weights(finished)
    run(config("eval_every=3"), finished)
    assert f"{finished} is finished: run `dirl eval model={finished}/model`" in capsys.readouterr().out
    assert weights(finished) == before


def test_what_the_run_shows(tmp_path, capsys):
    run(config("max_tokens=49", "data.worked=0.7"), tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        "32 training demonstrations of arithmetic, 1,315 tokens; 8 left out that are longer than max_tokens=49"
    )
    assert any(line.startswith("step 6/6 · 0:00 left · loss ") for line in shown)
    form = r" · validation loss \S+( · greedy accuracy \S+)? · 0.25 hidden: \d+% right · .* · 1 hidden: \d+% right"
    for moment in ("before", "step 6/6"):
        assert any(re.fullmatch(moment + form, line) for line in shown)
    assert shown[-1] == f"the model is in {tmp_path}/model: run `dirl eval model={tmp_path}/model`"


def test_hidden_tokens_are_guessed_right_as_often_as_the_metric_says():
    lm = Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu", "sdpa")
    guess = int(lm.model(torch.full((1, 4), lm.mask_token_id)).logits[0, 0].argmax())
    trained = {n: [place >= 3 for place in range(n)] for n in (10, 14)}
    examples = [example([guess, 9] * (n // 2), trained[n], lm.block_size, guess) for n in trained]
    noise = Noise(PerBlock(), lm.block_size, lm.mask_token_id, lm.pad_token_id, 64)
    optimizers = [torch.optim.SGD(lm.model.parameters())]
    trainer = Trainer(Accelerator(cpu=True), LogprobModel(lm.model), optimizers, lambda _: 1.0, 1.0)
    found = hold_out(examples, noise, [1.0], seed=0).measure(trainer, cross_entropy, None)
    right = []
    for one in examples:  # blocks one after another, each hidden altogether behind those that are not
        for first in range(0, len(one.token_ids), lm.block_size):
            block = one.trained[first : first + lm.block_size]
            shown = one.token_ids[: first + lm.block_size].clone()
            shown[first:][block] = lm.mask_token_id
            if block.any():
                position = torch.arange(len(shown)) // lm.block_size
                mask = (position[:, None] >= position)[None, None]
                logits = lm.model(shown[None], attention_mask=mask).logits[0, first:]
                right += (logits.argmax(-1) == one.token_ids[first : first + lm.block_size])[block].tolist()
    assert 0 < sum(right) < len(right)
    assert found[metric(1.0)] == pytest.approx(sum(right) / len(right))


def test_micro_batches_change_nothing(finished, tmp_path):
    run(config("eval_every=3", "micro_rows=1"), tmp_path)
    found = [[line[name] for name in ("loss", "grad_norm")] for line in lines(tmp_path)[1:]]
    expected = [[line[name] for name in ("loss", "grad_norm")] for line in lines(finished)[1:]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_bf16_keeps_the_parameters_in_float32_and_saves_them_as_bf16(tmp_path):
    run(config("dtype=bfloat16", "steps=2", "eval_problems=0"), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    checkpoint = tmp_path / "checkpoints/step-000002/model.safetensors"
    assert checkpoint.stat().st_size > 1.9 * len(weights(tmp_path)) - 20_000


def test_a_run_may_start_from_the_checkpoint_of_another(finished, tmp_path, capsys):
    run(config("eval_every=3", f"resume={finished}/checkpoints/step-000004"), tmp_path)
    assert "going on after step 4" in capsys.readouterr().out
    assert weights(tmp_path) == weights(finished)


def test_a_checkpoint_becomes_a_model(finished, tmp_path):
    checkpoint = finished / "checkpoints/step-000004"
    run(config("steps=4", f"resume={checkpoint}"), tmp_path)
    saved, model = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(model[name], value) for name, value in saved.items())


@pytest.mark.parametrize(("measured", "best_of"), [("validation_loss", min), ("denoising_accuracy/0.5", max)])
def test_the_best_checkpoint_is_saved_where_it_is_measured(tmp_path, measured, best_of):
    words = ("steps=4", "eval_every=1", "eval_problems=0", "save_every=0", "keep_checkpoints=1")
    run(config(*words, f"keep_best={measured}", "async_checkpoints=true"), tmp_path)
    best = best_of(lines(tmp_path)[1:], key=lambda line: line[measured])["step"]
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({best, 4})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["max_tokens=9"], "nothing of arithmetic is left to learn from: raise max_tokens"),
        (["dtype=float16"], "dtype=float16: did you mean"),
        (["device=gpu"], "device=gpu: did you mean cuda"),
        (["optim.lr=1e30", "optim.adamw_lr=1e30"], "the loss is .* at step 5, number 4 in a row to be"),
        (["resume=nowhere"], "nowhere holds no checkpoint"),
        (["keep_best=acuracy"], "keep_best=acuracy is not measured in this run"),
    ],
)
def test_what_a_user_can_fix_is_told_in_a_sentence(tmp_path, words, sentence):
    with pytest.raises(DirlError, match=sentence):
        run(config("eval_problems=0", *words), tmp_path)


class Child:
    """A run in a process of its own, which may be killed."""

    def __init__(self, out: Path) -> None:
        self.log = out.with_suffix(".log")
        sys.stdout.flush()
        self.pid = os.fork()  # a new interpreter would take seconds to import torch, each time
        if self.pid:
            return
        code = 1
        try:
            with self.log.open("a", buffering=1) as sys.stdout:
                run(KILLED, out)
            code = 0
        except DirlError as error:
            self.log.write_text(self.log.read_text() + str(error))
            code = error.exit_code
        finally:
            os._exit(code)

    def send(self, number: int, after: str) -> "Child":
        """Send a signal once the run has shown some words."""
        while not self.log.exists() or after not in self.log.read_text():
            time.sleep(0.005)
        os.kill(self.pid, number)
        return self

    def end(self) -> int:
        """The exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    torch.set_num_threads(1)
    through, out = tmp_path / "through", tmp_path / "killed"
    through.mkdir()
    out.mkdir()
    run(KILLED, through)
    for moment in ("40 training", "step 1/6", "step 2/6"):
        assert Child(out).send(signal.SIGKILL, moment).end() == -signal.SIGKILL
    assert Child(out).send(signal.SIGTERM, "step 3/6").end() == 0
    assert Child(out).end() == 0
    told = out.with_suffix(".log").read_text()
    assert re.search(r"stopped after step [345] of 6, saved in .*: the same command goes on", told)
    assert "going on after step" in told
    assert weights(out) == weights(through)
    assert [line["step"] for line in lines(out)] == [*range(7)]
    assert [line.get("loss") for line in lines(out)] == [line.get("loss") for line in lines(through)]


def test_an_evaluation_that_was_cut_short_is_made_up_for(finished, tmp_path, monkeypatch):
    """And the line of its step is written then, as an undisturbed run writes it."""
    measure, cut = FinetuneEvaluation.measure, []

    def interrupted(self):
        if not cut:
            cut.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            with self.held_out.stoppable():
                pass
        return measure(self)

    monkeypatch.setattr(FinetuneEvaluation, "measure", interrupted)
    with pytest.raises(Stopped, match="stopped after step"):
        run(config("eval_every=3"), tmp_path)
    step = int(max((tmp_path / "checkpoints").iterdir()).name[5:])
    assert step not in [line["step"] for line in lines(tmp_path)], "its line waits for the evaluation"
    run(config("eval_every=3"), tmp_path)
    assert weights(tmp_path) == weights(finished)
    ours, undisturbed = ([untimed(line) for line in lines(out)] for out in (tmp_path, finished))
    assert ours == undisturbed


def untimed(line):
    return {key: value for key, value in line.items() if not key.startswith(("time", "seconds/", "tokens_per_s"))}


@pytest.mark.parametrize("words", [("optim=adamw",), ("optim=adamw", "optim.lr=1e-3"), ("optim=muon", "optim.lr=0.02")])
def test_the_rate_of_a_published_checkpoint_is_told_where_weights_are_random(tmp_path, capsys, words):
    run(config("steps=1", "eval_problems=0", *words), tmp_path)
    sentence = "optim.lr=1e-05 is for a published checkpoint, and this model begins at random: give 1e-3"
    assert (sentence in capsys.readouterr().out) == (words == ("optim=adamw",))


def test_real_demonstrations_with_the_real_tokenizer_train_save_and_go_on(shared, tmp_path, capsys):
    model = published_vocabulary(tmp_path / "random", shared)
    rows = json.loads((shared / "data/GSM8K-train-sft.json").read_text())[:200]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["model=path", f"model.path={model}", "data=file", f"data.path={tmp_path}/data.json", "data.held_out=2"]
    size = ["steps=3", "batch_size=2", "save_every=2", "dtype=float32", "optim.lr=1e-2", "device=cpu"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("sft", ["~experiment", *words, *size, "max_tokens=300", "row_tokens=512"])
    OmegaConf.resolve(cfg)
    run(cfg, tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000003")
    run(cfg, tmp_path)
    assert "going on after step 2" in capsys.readouterr().out
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(151936), rel=0.2) and losses[-1] < losses[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").convert_tokens_to_ids("<|im_end|>") == 151645


def test_blocks_grow_as_their_held_out_loss_stops_falling_and_a_run_goes_on_to_the_same_bytes(tmp_path):
    """Nothing is learned at such a rate, so that the second evaluation of each stage is as the first."""
    words = ["annealing.block_sizes=[1,2]", "annealing.patience=1", "eval_every=1", "eval_problems=0", "save_every=1"]
    cfg = config(*words, "optim.lr=1e-30", "optim.adamw_lr=1e-30", "steps=5", "keep_checkpoints=0")
    run(cfg, tmp_path)
    states = [json.loads((tmp_path / f"checkpoints/step-{step:06d}/state.json").read_text()) for step in range(1, 6)]
    assert [state["block_size"] for state in states] == [1, 1, 2, 2, 4]
    assert [state["stages"]["ended"] for state in states] == [[], [2], [2], [2, 4], [2, 4]]
    assert ["stage_loss" in line for line in lines(tmp_path)] == [True] * 5 + [False]
    whole, losses = weights(tmp_path), [line.get("loss") for line in lines(tmp_path)]

    shutil.rmtree(tmp_path / "model")
    for step in range(2, 6):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")
    run(cfg, tmp_path)
    assert weights(tmp_path) == whole and [line.get("loss") for line in lines(tmp_path)] == losses


def test_a_run_that_ends_before_its_last_stage_leaves_a_model_of_its_blocks(tmp_path):
    words = ["annealing.block_sizes=[2]", "annealing.patience=3", "eval_every=1", "eval_problems=0", "steps=2"]
    run(config(*words), tmp_path)
    assert json.loads((tmp_path / "model/config.json").read_text())["block_size"] == 2
    with pytest.raises(DirlError, match="ends a stage by what is held out, and nothing is"):
        run(config(*words, "data.held_out=0"), tmp_path / "b")


def batches(batch_size: int, seed: int = 0) -> NoisedBatches:
    """Five demonstrations, each of its own token."""
    demonstrations = [example([i] * 8, [False] * 4 + [True] * 4, 4, 0) for i in range(1, 6)]
    order = MixtureOrder((5,), (1.0,), partial(generator, seed))
    return NoisedBatches(demonstrations, order, batch_size, lambda step: Noise(PerBlock(), 4, 9, 0, 16), seed)


def test_every_epoch_shows_every_demonstration_once_in_a_new_order():
    drawn = [i for step in range(5) for i in batches(2).chosen(step)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:]


def test_a_batch_is_the_same_whenever_it_is_asked_for_and_another_for_another_seed():
    one, again, other = batches(4)[3][0], batches(4)[3][0], batches(4, seed=1)[3][0]
    assert torch.equal(one.token_ids, again.token_ids) and torch.equal(one.target_index, again.target_index)
    assert one.token_ids.shape != other.token_ids.shape or not torch.equal(one.token_ids, other.token_ids)


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batches(10).chosen(0)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_generators_differ_in_every_number_and_their_order():
    draws = {float(torch.rand(1, generator=generator(*numbers))) for numbers in ((0,), (1,), (0, 1), (1, 0), (0, 0))}
    assert len(draws) == 5


def test_a_run_whose_every_step_was_skipped_has_no_model(tmp_path):
    words = ("steps=2", "eval_problems=0", "skip_norm=1e-9", "max_skipped=5")
    for _ in range(2):  # given again, the same command has nothing else to say
        with pytest.raises(DirlError, match="no step changed the model, so there is none to save"):
            run(config(*words), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_rate_that_is_0_at_the_only_step_changes_nothing(tmp_path):
    with pytest.raises(DirlError, match="its gradients were skipped or its rates 0"):
        run(config("steps=1", "eval_problems=0", "schedule=linear", "schedule.warmup=0"), tmp_path)
