"""Evaluation: nothing is sampled twice, nothing is lost, and what stopped it changes no answer."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from dirl_cli.commands import eval as command
from dirl_cli.console import PlainConsole
from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.data.chat import answer_text, encode_problems
from dirl_cli.errors import DirlError, Stopped
from dirl_cli.evaluation.answers import AnswerLog, GradedAnswer, SampleRange, drop_torn_line, missing, read_answers
from dirl_cli.evaluation.metrics import measure
from dirl_cli.evaluation.questions import sample
from dirl_cli.evaluation.report import PROTOCOL
from dirl_cli.evaluation.run import graded, tracked
from dirl_cli.files import conf_dir
from dirl_cli.models.tiny import train_tokenizer
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Decoding, Instruction, Problem, Trajectory
from tests.helpers.small import published_vocabulary

ANSWER = GradedAnswer("a", 0, "\\boxed{1}\n é", True, "stop", 10, 12, 6, 8, 0.5)
CONFIG = OmegaConf.create(
    {
        "gpus": 1,
        "nodes": 1,
        "model": {"_target_": "dirl_cli.models.tiny.Tiny", "name": "tiny"},
        "bench": {"_target_": "dirl_cli.data.arithmetic.Arithmetic", "name": "arithmetic", "train": 100, "test": 12},
        "samples": 2,
        "dry_run": False,
        "limit": 6,
        "ids": None,
        "predictions": None,
        "compare": None,
        "rollout": {
            "_target_": "dirl_cli.rollout.engines.Native",
            "max_batch": 4,
            "products": "auto",
            "cache_share": 0.8,
        },
        "harness": None,
        "dtype": "float32",
        "attention": "auto",
        "device": "cpu",
        "grade_workers": 1,
        "grade_timeout": 10.0,
        "instruction": {},
        "decoding": {"max_new_tokens": 12, "temperature": 1.0},
    }
)


class Oracle:
    """A sampler that boxes its sample index and notes what it was asked for; the last answer comes first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.asked: list[tuple[str, int, int]] = []  # question, seed, sample

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        decoding: Decoding,
        first: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, int, Trajectory]]:
        for i in reversed(range(len(prompts))):
            for number in range(first[i], n):
                question = self.tokenizer.decode(prompts[i]).split("user\n")[1].split("<|im_end|>")[0]
                self.asked.append((question, seeds[i], number))
                ids = self.tokenizer(f"\\boxed{{{number}}}<|im_end|><|endoftext|>")["input_ids"]
                yield i, number, Trajectory(prompts[i], ids, [1] * len(ids), [0.0] * len(ids), "stop", 2, 3, 0, (2,))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(islice(Arithmetic(train=500).texts(), 1000))


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    other = GradedAnswer("b", 1, "", False, "length", 0, 4, 1, 1, 0.1)
    for answer in (ANSWER, other):  # as in two starts of the same run
        with AnswerLog(tmp_path / "answers.jsonl") as log:
            log.append(answer)
    assert read_answers(tmp_path / "answers.jsonl") == [ANSWER, other]
    assert read_answers(tmp_path / "none.jsonl") == []


def test_answers_of_earlier_versions_are_read_without_what_these_did_not_write(tmp_path: Path) -> None:
    line = {name: value for name, value in asdict(ANSWER).items() if name not in ("question", "reference", "extracted")}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    assert read_answers(tmp_path / "answers.jsonl") == [ANSWER]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_dropped_and_no_other(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswerLog(file) as log:
        log.append(ANSWER)
        log.append(ANSWER)
    os.truncate(file, file.stat().st_size - cut)
    drop_torn_line(file)
    assert read_answers(file) == [ANSWER] and file.read_text().endswith("}\n")


def test_a_damaged_line_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with AnswerLog(file) as log:
        log.append(ANSWER)
    file.write_text(file.read_text() + '{"problem": "a"}\n')
    with pytest.raises(DirlError, match="line 2 is not an answer"):
        read_answers(file)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_told_in_one_sentence() -> None:
    with AnswerLog(Path("/dev/full")) as log, pytest.raises(DirlError, match="No space left on device"):
        log.append(ANSWER)


def test_of_several_processes_the_one_whose_answers_are_counted_is_named(capsys: pytest.CaptureFixture) -> None:
    for processes, shown in ((1, ""), (2, " · process 1 of 2")):
        list(tracked([ANSWER], [], 1, PlainConsole(), processes))
        assert re.fullmatch(rf"1/1 answers · accuracy 100\.0 · [\d,]+ tokens/s{shown}\n", capsys.readouterr().out)


def test_only_missing_samples_are_asked_for() -> None:
    done = {("a", 0), ("a", 1), ("a", 2), ("b", 1), ("c", 0)}
    assert list(missing(["a", "b", "c", "d"], 3, done)) == [
        SampleRange(1, 0, 1),
        SampleRange(1, 2, 3),
        SampleRange(2, 1, 3),
        SampleRange(3, 0, 3),
    ]


def test_an_interrupted_sampling_asks_for_the_same_samples_as_a_whole_one(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = [Problem(str(i), question, "1") for i, question in enumerate(["a", "b", "a", "c", "a"])]
    prompts = encode_problems(tokenizer, problems, Instruction(), 100)
    whole, rest = Oracle(tokenizer), Oracle(tokenizer)
    ids = [problem.id for problem in problems]
    everything = list(sample(whole, prompts, list(missing(ids, 4, set())), Decoding()))
    done = {("0", 1), ("2", 0), ("2", 3), ("3", 0), ("3", 1), ("3", 2), ("3", 3)}
    others = list(sample(rest, prompts, list(missing(ids, 4, done)), Decoding()))
    assert {(str(i), sample) for i, sample, _ in others} == {(str(i), sample) for i, sample, _ in everything} - done
    assert len(whole.asked) == len(set(whole.asked)) == 20  # also the three equal questions differ, by their seeds
    assert set(rest.asked) < set(whole.asked) and len(rest.asked) == 13


def test_answers_are_graded_against_their_own_problem(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = [Problem("x", "What?", "0"), Problem("y", "Why?", "1.0"), Problem("z", "Who?", "2")]
    prompts = encode_problems(tokenizer, problems, Instruction(), 100)
    runs = list(missing([problem.id for problem in problems], 2, set()))
    sampled = sample(Oracle(tokenizer), prompts, runs, Decoding())
    with Grader(1, 30.0) as grader:
        answers = list(graded(sampled, problems, partial(answer_text, tokenizer), grader))
    right = {(answer.problem, answer.sample): answer.correct for answer in answers}
    assert right == {("x", 0): True, ("x", 1): False, ("y", 0): False, ("y", 1): True, ("z", 0): False, ("z", 1): False}
    one = next(answer for answer in answers if answer.problem == "x")
    assert one.text == "\\boxed{0}" and (one.length, one.tokens) == (
        len(tokenizer(one.text)["input_ids"]),
        one.length + 2,
    )
    assert (one.question, one.reference, one.extracted) == ("What?", "0", "0")
    assert measure(answers).accuracy == pytest.approx(1 / 3)


def test_a_prompt_over_the_limit_is_named_by_its_problem(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = [Problem("short", "a", "1"), Problem("long", "a " * 50, "1")]
    with pytest.raises(DirlError, match=r"the prompt of problem long has 1\d\d tokens and the model has room for 60"):
        encode_problems(tokenizer, problems, Instruction(), 60)


def config(**changes: object) -> DictConfig:
    """The configuration with changes; a group with another `_target_` is another group."""
    base = CONFIG.copy()
    for name, change in changes.items():
        if isinstance(change, dict) and "_target_" in change:
            del base[name]
    return OmegaConf.merge(base, OmegaConf.create(changes))


def by_sample(out: Path) -> dict[tuple[str, int], str]:
    return {(answer.problem, answer.sample): answer.text for answer in read_answers(out / "answers.jsonl")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the untrained tiny model."""
    out = tmp_path_factory.mktemp("whole")
    command.run(config(), out)
    return out


def test_an_evaluation_leaves_its_answers_and_a_card_with_every_setting(finished: Path) -> None:
    assert len(by_sample(finished)) == 12
    card = json.loads((finished / "eval_card.json").read_text())
    assert card["metrics"]["problems"] == 6 and card["metrics"]["answers"] == 12 and card["samples"] == 2
    assert set(card["decoding"]) == set(Decoding.__dataclass_fields__)
    assert (card["decoding"]["block_size"], card["decoding"]["stop_token_ids"]) == (4, [2])
    assert card["model"]["name"] == "tiny" and card["bench"]["limit"] == 6
    assert {"python", "torch", "transformers", "math-verify"} <= card["versions"].keys()
    assert "How many legs have two cats?" in card["prompt_example"]["prompt"] and card["rollout"]["max_batch"] == 4
    hardware = card["record"]["hardware"]
    assert hardware["processes"] == 1 and hardware["cores"] >= 1 and hardware["memory_gb"] > 0 and hardware["cpu"]
    assert datetime.fromisoformat(card["record"]["date"]).utcoffset() == timedelta(0)
    assert re.fullmatch("[0-9a-f]{64}", card["sampled_from"]["weights"])


def test_what_an_interruption_left_is_kept_and_the_rest_is_sampled_the_same(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[2:7]) + lines[8][:40])
    command.run(config(), tmp_path)
    assert by_sample(tmp_path) == by_sample(finished)
    assert (tmp_path / "answers.jsonl").read_text().startswith("".join(lines[2:7]))


def test_where_nothing_is_left_to_answer_the_record_stays_that_of_the_start_that_ended_it(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    card = json.loads((out / "eval_card.json").read_text())
    record = {"date": "2020-01-01T00:00:00+00:00", "hardware": {"cpu": "another"}, "environment": {}}
    (out / "eval_card.json").write_text(json.dumps(card | {"record": record}))
    command.run(config(), out)
    assert json.loads((out / "eval_card.json").read_text())["record"] == record

    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(lines[1:]))
    command.run(config(), out)
    assert json.loads((out / "eval_card.json").read_text())["record"]["date"] > record["date"]


def test_the_batch_size_changes_no_answer(finished: Path, tmp_path: Path) -> None:
    command.run(
        config(
            rollout={
                "_target_": "dirl_cli.rollout.engines.Native",
                "max_batch": 3,
                "products": "auto",
                "cache_share": 0.8,
            }
        ),
        tmp_path,
    )
    assert by_sample(tmp_path) == by_sample(finished)


def test_answers_of_other_weights_are_not_mixed_in(finished: Path, tmp_path: Path) -> None:
    for name in ("answers.jsonl", "sampled_from.json"):
        (tmp_path / name).write_text((finished / name).read_text())
    with pytest.raises(DirlError, match="answers of other weights, changed since"):
        command.run(config(model={"seed": 1}), tmp_path)
    with pytest.raises(DirlError, match="answers of other problems, changed since"):
        command.run(config(bench={"seed": 1}), tmp_path)
    assert by_sample(tmp_path) == by_sample(finished)


def test_more_samples_and_problems_add_to_the_answers_there_are(finished: Path, tmp_path: Path) -> None:
    command.run(config(samples=1, limit=3), tmp_path)
    few = (tmp_path / "answers.jsonl").read_text()
    command.run(config(), tmp_path)
    assert by_sample(tmp_path) == by_sample(finished)
    assert (tmp_path / "answers.jsonl").read_text().startswith(few)


def test_fewer_samples_and_problems_are_reported_without_sampling(finished: Path, tmp_path: Path) -> None:
    copytree(finished, tmp_path, dirs_exist_ok=True)
    command.run(config(samples=1, limit=3), tmp_path)
    metrics = json.loads((tmp_path / "eval_card.json").read_text())["metrics"]
    assert (metrics["problems"], metrics["answers"], metrics["majority"]) == (3, 3, None)
    assert (tmp_path / "answers.jsonl").read_text() == (finished / "answers.jsonl").read_text()


def test_problems_are_chosen_by_id(finished: Path, tmp_path: Path) -> None:
    ids = sorted({problem for problem, _ in by_sample(finished)})[2:4]
    command.run(config(ids=ids), tmp_path)
    assert by_sample(tmp_path) == {key: text for key, text in by_sample(finished).items() if key[0] in ids}
    with pytest.raises(DirlError, match=r"arithmetic has no problem 7: they go from .+ to .+"):
        command.run(config(ids=["7"]), tmp_path)


def test_the_published_figure_stands_beside_ours_and_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bench = OmegaConf.to_container(CONFIG.bench) | {"_target_": f"{__name__}.Published"}
    bench["published"] = {"tiny": {"low_confidence_dynamic": [50.0, 2.0, 100]}}
    command.run(config(bench=bench), tmp_path)
    card = json.loads((tmp_path / "eval_card.json").read_text())
    assert card["published"]["difference"] == pytest.approx(100 * card["metrics"]["accuracy"] - 50)
    assert card["published"]["differently"]["samples"] == [2, 16]
    assert "decoding.threshold" not in card["published"]["differently"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "published (avg@16): 50 %, 2 tok/step, length 100" in shown
    assert "samples 2 instead of 16, bench.limit 6 instead of none" in shown


@dataclass(frozen=True)
class Published(Arithmetic):
    """A benchmark with published figures."""

    published: dict[str, Any] = field(default_factory=dict)


def test_the_experiment_of_the_papers_is_their_protocol() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("eval", ["experiment=eval_paper"])
    asked = {key: OmegaConf.select(cfg, key) for key in PROTOCOL if not key.startswith("bench.")}
    assert asked == {key: value for key, value in PROTOCOL.items() if not key.startswith("bench.")}
    assert cfg.decoding.strategy == "low_confidence_dynamic" and cfg.limit is cfg.ids is None


@pytest.mark.parametrize("limit", [12, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", ["MATH500", "GSM8K"])
def test_real_benchmarks_run_to_the_end(shared: Path, tmp_path: Path, name: str, limit: int | None) -> None:
    model = published_vocabulary(tmp_path / "model", shared)
    command.run(
        config(
            model={"_target_": "dirl_cli.models.load.SavedModel", "name": "random", "path": str(model)},
            bench={"_target_": "dirl_cli.data.files.ProblemFile", "name": name, "path": f"{shared}/data/{name}.json"},
            samples=1,
            limit=limit,
            rollout={
                "_target_": "dirl_cli.rollout.engines.Native",
                "max_batch": 64,
                "products": "auto",
                "cache_share": 0.8,
            },
            decoding={"max_new_tokens": 8},
        ),
        tmp_path,
    )
    card = json.loads((tmp_path / "eval_card.json").read_text())
    assert card["metrics"]["problems"] == (limit or {"MATH500": 500, "GSM8K": 1319}[name])
    assert card["metrics"]["truncated"] == 1.0


def test_ctrl_c_in_an_evaluation_says_what_it_has_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys) -> None:
    append = AnswerLog.append

    def interrupted(log: AnswerLog, answer: GradedAnswer) -> None:
        append(log, answer)
        if len(read_answers(tmp_path / "answers.jsonl")) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerLog, "append", interrupted)
    with pytest.raises(Stopped) as stopped:
        command.run(config(), tmp_path)
    left = f"5 of 12 answers are in {tmp_path}/answers.jsonl"
    assert (str(stopped.value), stopped.value.exit_code) == (f"stopped: {left}, and the same command goes on", 130)
    assert not (tmp_path / "eval_card.json").exists()

    monkeypatch.setattr(AnswerLog, "append", append)
    capsys.readouterr()
    command.run(config(), tmp_path)
    assert f"continue after 5 answers in {tmp_path}/answers.jsonl" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval_card.json").read_text())["metrics"]["answers"] == 12


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from dirl_cli.cli.app import app; app()", "eval"]
    words += ["limit=40", "decoding.temperature=1", "decoding.max_new_tokens=16", "rollout.max_batch=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = tmp_path / "cut" / "answers.jsonl"
    process = subprocess.Popen([*words, f"out={tmp_path / 'cut'}"], env=environment, stdout=subprocess.DEVNULL)
    while not (file.exists() and file.stat().st_size > 1000) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    some = read_answers(file) if file.read_bytes().endswith(b"\n") else []
    assert len(some) < 40
    for out in ("cut", "whole"):
        subprocess.run([*words, f"out={tmp_path / out}"], env=environment, check=True, capture_output=True)
    assert by_sample(tmp_path / "cut") == by_sample(tmp_path / "whole")
