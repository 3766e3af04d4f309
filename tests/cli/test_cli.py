"""`dirl` from the words of a command line to the config and directory that a command is handed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli import config_tree, overrides
from dirl_cli.cli.build import build
from dirl_cli.cli.complete import complete_override, rejoin
from dirl_cli.cli.schema import SCHEMAS, slug
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.types import Decoding, Instruction
from tests.helpers.algorithms import ALGORITHMS
from tests.helpers.command_line import dirl, refusal


def compose_job(command, *words):
    config_tree.prepare(None)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(command, overrides.drop_preset(words, config_tree.preset(command)))


def test_help_imports_neither_hydra_nor_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from dirl_cli.cli.app import app\n"
        "assert 'sft' in CliRunner().invoke(app, ['--help']).stdout\n"
        "print([name for name in ('hydra', 'omegaconf', 'yaml', 'torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_command_is_handed_its_config_and_its_directory(jobs):
    assert dirl("sft", "optim.lr=0.5").exit_code == 0
    (cfg,) = jobs
    assert cfg["optim"]["lr"] == 0.5
    assert cfg["out"] == "runs/sft/tiny-arithmetic"
    assert Path("runs/sft/tiny-arithmetic/config.yaml").exists()


def test_a_command_alone_is_the_embedded_preset_and_gives_way_to_the_command_line():
    tiny, large = compose_job("sft"), compose_job("sft", "model=sdar8b")
    assert (tiny.optim._target_.split(".")[-1], tiny.steps, tiny.dtype) == ("Muon", 1400, "auto")
    assert (large.optim._target_.split(".")[-1], large.optim.lr, large.dtype) == ("AdamW", 1e-5, "auto")
    mine = compose_job("sft", "optim=adamw", "steps=7")
    assert (mine.optim._target_.split(".")[-1], mine.steps, mine.dtype) == ("AdamW", 7, "auto")


@pytest.mark.parametrize("command", ["sft", "rl", "dpo", "eval", "generate", "chat"])
def test_a_checkpoint_is_treated_alike_however_it_is_spelled(jobs, here, command):
    """Nor does a path to the embedded model's, which no command can tell from another, bring that model's preset."""
    spellings = ["model=sdar8b", "model=JetLM/SDAR-8B-Chat", "model.path=some/DIR", "model=some/DIR"]
    spellings += ["model=tiny_sft", "model=runs/sft/tiny-arithmetic/model"]
    for spelling in spellings:
        assert dirl(command, spelling).exit_code == 0
    told_apart = ("model", "name", "out")
    first, *others = [{key: value for key, value in job.items() if key not in told_apart} for job in jobs]
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("words", "model", "facts"),
    [
        (["sft"], "tiny", "model=tiny (random weights), data=arithmetic"),
        (["sft", "data=a/b.jsonl", "steps=7"], "tiny", "model=tiny (random weights), data=a-b"),
        (["rl", "algo=grpo"], "tiny", "model=tiny_sft (runs/sft/tiny-arithmetic/model), data=arithmetic"),
        (["eval"], "tiny", "model=tiny (random weights), bench=arithmetic"),
        (["generate"], "tiny", "model=tiny (random weights)"),
    ],
)
def test_a_command_that_is_given_no_model_says_in_its_first_line_what_it_takes(jobs, words, model, facts):
    said = f"no model= is given, so this is experiment=tiny_{words[0]}: {facts}"
    assert dirl(*words).stdout.splitlines() == [said, f"dirl {words[0]} → {jobs[-1]['out']}"]
    assert jobs[-1]["model"]["name"] == model
    assert dirl(*words, f"experiment=tiny_{words[0]}", "name=again").stdout.startswith(f"dirl {words[0]} → ")
    assert jobs[-1] | {"name": "", "out": ""} == jobs[-2] | {"name": "", "out": ""}


def test_the_first_line_is_said_once_in_a_sweep_and_not_where_no_model_is_read(jobs):
    assert dirl("sft", "-m", "seed=1,2,3").stdout.count("no model=") == 1
    assert "no model=" not in dirl("eval", "predictions=a.jsonl", "bench.path=b.json").stdout


def test_a_preset_is_named_for_a_model_of_ones_own(jobs):
    assert dirl("rl", "experiment=tiny_rl", "model=some/DIR").exit_code == 0
    assert (jobs[-1]["model"]["path"], jobs[-1]["steps"], jobs[-1]["optim"]["lr"]) == ("some/DIR", 120, 2e-4)


def test_a_tree_of_ones_own_says_what_its_commands_do_by_default(jobs, here):
    (here / "my/experiment").mkdir(parents=True)
    given = (conf_dir() / "generate.yaml").read_text()
    (here / "my/generate.yaml").write_text(given.replace("tiny_generate", "mine"))
    (here / "my/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [{override /model: dirl8b}]\nsamples: 3\n"
    )
    for words in ([], ["model=sdar8b"]):
        assert dirl("generate", "-cd", "my", *words).exit_code == 0
    assert [(job["model"]["name"], job["samples"]) for job in jobs] == [("dirl8b", 3), ("sdar8b", 1)]


def test_a_groups_choices_are_told_a_line_each():
    shown = dirl("rl", "algo=help").stdout
    for name in ALGORITHMS:
        [line] = [line for line in shown.splitlines() if line.startswith(f"algo={name} ")]
        assert len(line.split()) > 3
    other = dirl("sft", "masking=help").stdout
    assert "masking=band" in other and "gdpo" not in other


def test_an_unknown_choice_is_answered_with_what_each_is():
    error = dirl("rl", "algo=ppo")
    assert error.exit_code == 1
    *table, sentence = error.stderr.splitlines()
    assert sentence.startswith("dirl rl: algo=ppo: choose one of ") and any("algo=spg" in line for line in table)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.lrr=1"], "dirl sft: optim.lrr: no such key; did you mean optim.lr?"),
        (["lr=1"], "dirl sft: lr: no such key; did you mean optim.lr?"),
        (["masking.low=0.1"], "dirl sft: masking.low: no such key; it is a key of masking=band"),
        (["decoding=dynamc"], "dirl sft: decoding=dynamc: did you mean dynamic?"),
        (["optim=sgd"], "dirl sft: optim=sgd: choose one of adamw, adamw_dpo, adamw_rl, adamw_rl_tiny, muon"),
        (["steps=few"], "dirl sft: steps=few: give a whole number of at least 1"),
        (["seed=1,2"], "dirl sft: seed=1,2: add -m to run each of them"),
        (["-m", "seed=1,2", "optim.lrr=1"], "dirl sft: optim.lrr: no such key; did you mean optim.lr?"),
        (["seed"], "dirl sft: seed: an override has the form KEY=VALUE"),
        (["+seed=1"], "dirl sft: +seed: the key is there already; write seed=… without the +"),
        (["data=file"], "dirl sft: give a value for data.path, such as data.path=…"),
        (
            ["-m", "model=tiny,a/b"],
            "dirl sft: model=tiny,a/b mixes names and paths: sweep over the names, then over the paths",
        ),
        (["model=tiny", "seed=13"], "dirl sft: 13 brings bad luck: take another seed"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(jobs, words, sentence):
    assert refusal("sft", *words) == sentence


def test_a_mistyped_model_is_compared_with_the_choices(jobs):
    assert refusal("download", "model=sdar8") == "dirl download: model=sdar8: did you mean sdar8b?"


def test_a_path_takes_the_place_of_a_choice(jobs, here):
    (here / "plain").mkdir()
    odd = "../it's odd, ${so}/x=1"
    for value, path, name in [
        ("runs/sft/a/model/", "runs/sft/a/model", "runs-sft-a-model"),
        ("plain", "plain", "plain"),
        ("JetLM/SDAR-8B-Chat", "JetLM/SDAR-8B-Chat", "JetLM-SDAR-8B-Chat"),
        (odd, odd, "its-odd,-so-x=1"),
    ]:
        assert dirl("generate", f"model={value}").exit_code == 0
        assert jobs[-1]["model"]["path"] == path
        assert jobs[-1]["out"] == f"runs/generate/{name}"
    assert dirl("sft", "data=some/demos.jsonl").exit_code == 0
    assert (jobs[-1]["data"]["path"], jobs[-1]["name"]) == ("some/demos.jsonl", "tiny-some-demos")


@pytest.mark.timeout(600)  # it composes twenty times
def test_a_path_of_sampled_answers_is_read_as_such(jobs, here):
    for file in ("run/rollouts/step-000001.jsonl", "out/completions.jsonl", "rows/demos.jsonl"):
        (here / file).parent.mkdir(parents=True)
        (here / file).write_text('{"token_ids": [], "reveal_step": []}\n')
    for file in ("steps/step-1.jsonl", "said/completions.jsonl", "empty/completions.jsonl"):
        (here / file).parent.mkdir(parents=True)
        (here / file).write_text("" if "empty" in file else '{"question": "3+4?", "response": "7"}\n')
    for path, kind in [
        ("run", "SampledAnswers"),
        ("run/rollouts", "SampledAnswers"),
        ("run/rollouts/step-000001.jsonl", "SampledAnswers"),
        ("out/completions.jsonl", "SampledAnswers"),
        ("nowhere/completions.jsonl", "TrainingFile"),
        ("rows", "TrainingFile"),
        ("steps/step-1.jsonl", "TrainingFile"),
        ("said", "TrainingFile"),
        ("empty", "TrainingFile"),
    ]:
        assert dirl("sft", f"data={path}").exit_code == 0
        assert (jobs[-1]["data"]["path"], jobs[-1]["data"]["_target_"].rpartition(".")[2]) == (path, kind)
    for path, kind in [("run", "SampledAnswers"), ("rows", "TrainingFile")]:
        assert dirl("sft", f"data.path={path}").exit_code == 0
        assert jobs[-1]["data"]["_target_"].endswith(kind)
    for path in ("run", "out/completions.jsonl"):  # by any other command they are read as rows
        assert dirl("rl", f"data={path}").exit_code == 0
        assert jobs[-1]["data"]["_target_"].endswith("TrainingFile")
    assert refusal("sft", "-m", "data=run,rows").endswith(
        "data=run,rows mixes sampled answers and other rows: sweep over each by itself"
    )


TEXTS = [
    "Tom has 7 pens, and buys 5. It costs $5, right?",
    "What is 3+4? (hint: x=7)",
    "Tom's pens: [7, 5]; how many?",
    'He said "hi" to {me}',
    "Solve $x^2 = 4$ for $x$, with ${x} and \\${y} and \\\\${z}",
    "Café π 小明有7支笔，又买了5支。",
    "line one\nline two\n",
    "100% sure # not a comment",
    "-5 + 3 = ?",
    "'quoted'",
    "null",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_taken_as_it_is(jobs, text):
    assert dirl("generate", f"prompt={text}").exit_code == 0
    assert dirl("generate", "-m", f"prompt={text}", "seed=1").exit_code == 0
    assert dirl("generate", f"instruction.text={text}").exit_code == 0
    told = "{question} " + text
    assert dirl("rl", "algo=opsd", f"algo.teacher_prompt={told}").exit_code == 0
    assert [job["prompt"] for job in jobs[:3]] == [text, text, None]
    assert (jobs[2]["instruction"]["text"], jobs[3]["algo"]["teacher_prompt"]) == (text, told)


def test_a_path_is_taken_as_it_is_by_every_key_that_holds_one(jobs, here):
    odd = here / "optim.lr=0.0001,seed=0, 'a' {b} ${c} π"
    odd.mkdir()
    for words, value in [
        (["sft", f"resume={odd}"], lambda job: job["resume"]),
        (["sft", f"out={odd}"], lambda job: job["out"]),
        (["sft", f"data={odd}"], lambda job: job["data"]["path"]),
        (["sft", "data=file", f"data.path={odd}"], lambda job: job["data"]["path"]),
        (["rl", f"rl.replay={odd}"], lambda job: job["rl"]["replay"]),
        (["dpo", f"dpo.pairs_from={odd}"], lambda job: job["dpo"]["pairs_from"]),
        (["eval", f"predictions={odd}"], lambda job: job["predictions"]),
        (["eval", f"compare=[{odd.name},b c/d]"], lambda job: job["compare"][0]),
        (["generate", f"input={odd}"], lambda job: job["input"]),
        (["generate", "model=a/b", f"model.adapter={odd}"], lambda job: job["model"]["adapter"]),
        (["download", f"to={odd}"], lambda job: job["to"]),
    ]:
        assert dirl(*words).exit_code == 0
        assert value(jobs[-1]).endswith(odd.name)
    assert dirl("sft", "name=v=1, again").exit_code == 0
    assert jobs[-1]["out"] == "runs/sft/v=1, again"


def test_what_the_config_says_may_be_part_of_a_directory(jobs):
    assert dirl("generate", "seed=5", "out=runs/seed-${seed}").exit_code == 0
    assert jobs[-1]["out"] == "runs/seed-5"


def test_a_sweep_goes_through_paths_and_keeps_the_commas_of_those_that_exist(jobs, here):
    (here / "a,b").mkdir()
    assert dirl("eval", "-m", "predictions=a,b,c").exit_code == 0
    assert [job["predictions"] for job in jobs] == ["a,b", "c"]


def test_a_users_mapping_takes_the_place_of_the_one_there(jobs):
    assert dirl("rl", "reward.weights={boxed: 1, format: 0.5}").exit_code == 0
    assert jobs[-1]["reward"]["weights"] == {"boxed": 1, "format": 0.5}
    assert dirl("rl", "+reward.weights={boxed: 1}").exit_code == 0
    assert jobs[-1]["reward"]["weights"] == {"accuracy": 1.0, "boxed": 1}
    assert dirl("rl", "reward.weights={soft_overlong: 1}", "reward.options={soft_overlong: {cache: 5}}").exit_code == 0
    assert jobs[-1]["reward"]["options"] == {"soft_overlong": {"cache": 5}}
    refused = dirl("eval", "reward.weights={boxed: 1}")
    assert refused.exit_code == 1 and "reward.weights: no such key" in refused.stderr


def test_columns_are_mapped_as_the_advice_says_also_in_a_sweep(jobs):
    assert dirl("sft", "data=a.jsonl", "data.columns={question: problem, response: final}").exit_code == 0
    assert jobs[-1]["data"]["columns"] == {"question": "problem", "response": "final"}
    for words in ([], ["-m", "seed=1,2"]):
        assert dirl("eval", *words, "bench=math500", "bench.columns={question: problem}").exit_code == 0
        assert jobs[-1]["bench"]["columns"] == {"subset": "level", "question": "problem"}


def test_version_and_help_are_commands_too():
    assert dirl("version").stdout == dirl("--version").stdout
    assert dirl("help", "sft").stdout.startswith("Usage: dirl sft")
    assert dirl("help").stdout.startswith("Usage: dirl [OPTIONS]")


def test_commands_do_not_add_to_the_import_path(jobs):
    assert dirl("generate", "prompt=a").exit_code == dirl("generate", "prompt=b").exit_code == 0
    assert sys.path.count("") <= 1


def test_a_sweep_runs_every_combination_in_a_directory_of_its_own(jobs):
    assert dirl("sft", "-m", "optim.lr=0.1,0.2", "seed=1,2", "steps=5").exit_code == 0
    assert [(job["optim"]["lr"], job["seed"], job["steps"]) for job in jobs] == [
        (0.1, 1, 5), (0.1, 2, 5), (0.2, 1, 5), (0.2, 2, 5),
    ]  # fmt: skip
    assert jobs[1]["out"] == "runs/sft/tiny-arithmetic/optim.lr=0.1,seed=2"
    assert dirl("sft", "-m", "optim.lr=0.1,0.2", "seed=1,2", "steps=5").exit_code == 0
    assert [job["out"] for job in jobs[4:]] == [job["out"] for job in jobs[:4]]


def test_a_sweep_takes_several_paths(jobs):
    assert dirl("eval", "-m", "model=runs/a b/model,runs/c/model").exit_code == 0
    assert [job["model"]["path"] for job in jobs] == ["runs/a b/model", "runs/c/model"]
    assert jobs[1]["out"] == "runs/eval/runs-c-model-arithmetic/model.path=runs-c-model"
    assert "mixes names and paths" in refusal("eval", "-m", "model=tiny,runs/c/model")


def test_a_failed_job_of_a_sweep_is_named_and_the_others_run(jobs):
    result = dirl("sft", "-m", "seed=13,14")
    assert result.exit_code == 1
    assert [job["seed"] for job in jobs] == [13, 14]
    first, *_, last = result.stderr.splitlines()
    assert first == "dirl sft: 13 brings bad luck: take another seed"
    assert last == "dirl sft: the sweep is over, and not every run of it succeeded"


def test_a_sweep_is_summed_up_by_its_command_from_the_runs_that_succeeded(jobs, here, monkeypatch):
    ends = []
    eval_command = sys.modules["dirl_cli.commands.eval"]
    monkeypatch.setattr(eval_command, "after_sweep", lambda *given: ends.append(given), raising=False)
    assert dirl("eval", "-m", "seed=12,13,14", "samples=2").exit_code == 1
    folder = Path("runs/eval/tiny-arithmetic")
    assert ends == [("seed=12,13,14", [(["seed=12"], folder / "seed=12"), (["seed=14"], folder / "seed=14")])]
    assert dirl("eval", "-m", "seed=13,13").exit_code == 1 and dirl("eval", "seed=1").exit_code == 0
    assert len(ends) == 1
    assert not list(here.glob("runs/eval/.*"))


def test_all_of_a_group_is_a_sweep_over_its_members(jobs, monkeypatch):
    titles = []
    command = sys.modules["dirl_cli.commands.eval"]
    monkeypatch.setattr(command, "after_sweep", lambda title, _: titles.append(title), raising=False)
    benches = ["math500", "gsm8k", "aime2024", "aime2025", "olympiadbench"]
    assert dirl("eval", "bench=all", "model=sdar8b").exit_code == 0
    assert [job["bench"]["name"] for job in jobs] == benches
    assert [job["out"] for job in jobs] == [f"runs/eval/sdar8b-{bench}" for bench in benches]  # as without the sweep
    assert dirl("eval", "-m", "bench=all", "name=twice").exit_code == 0
    assert len(jobs) == 10 and jobs[-1]["out"] == "runs/eval/twice/bench=olympiadbench"
    assert titles == ["bench=all", "bench=all"]
    assert "each" in yaml.safe_load(dirl("eval", "bench=all", "--cfg", "job").stdout)["bench"]
    assert "bench=all" in complete_override("eval", [], "bench=a")


def test_a_list_of_benchmarks_is_a_sweep_over_them_each_with_its_own_options(jobs, monkeypatch):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    titles = []
    stand_in = sys.modules["dirl_cli.commands.eval"]
    monkeypatch.setattr(stand_in, "after_sweep", lambda title, jobs: titles.append((title, jobs)), raising=False)
    assert dirl("eval", "bench=[gsm8k,arithmetic,gym:countdown,gsm8k]", "model=sdar8b", "limit=3").exit_code == 0
    assert [job["bench"]["name"] for job in jobs] == ["gsm8k", "arithmetic", "gym-countdown"]
    assert [job["decoding"]["max_new_tokens"] for job in jobs] == [8192, 64, 8192]
    assert [job["instruction"]["text"] is None for job in jobs] == [False, True, False]
    assert "<answer>" in jobs[2]["instruction"]["text"] and jobs[2]["bench"]["task"] == "countdown"
    ((title, ended),) = titles
    assert title == "bench=gsm8k,arithmetic,gym-countdown"
    outs = [str(out) for _, out in ended]
    assert outs == [f"runs/eval/sdar8b-{name}" for name in ("gsm8k", "arithmetic", "gym-countdown")]


def test_all_in_a_list_of_benchmarks_stands_for_its_members(jobs):
    assert dirl("eval", "-m", "bench=[sudoku,all]", "model=sdar8b").exit_code == 0
    assert len(jobs) == 6 and jobs[0]["bench"]["name"] == "sudoku"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("bench=[gsm8k,gym:countdwn]", "reasoning-gym has no task countdwn: did you mean countdown?"),
        ("bench=gym:countdwn", "reasoning-gym has no task countdwn: did you mean countdown?"),
        ("bench=[gsm8k,math50]", "bench=math50: did you mean math500?"),
        (
            "bench=[gsm8k,likelihood]",
            "likelihood has other metrics than the rest, so give bench=likelihood in a run of",
        ),
        ("bench=[gsm8k,]", "a name is missing: give one between any two commas"),
    ],
)
def test_every_name_in_a_list_is_checked_before_the_first_is_run(jobs, word, sentence):
    if "gym:" in word:
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    result = dirl("eval", word, "model=sdar8b")
    assert result.exit_code == 1 and sentence in result.stderr and not jobs


def test_a_choice_that_the_name_tells_is_not_told_again(jobs):
    assert dirl("eval", "-m", "model=tiny,tiny_sft", "bench=arithmetic,gsm8k").exit_code == 0
    assert [job["out"] for job in jobs] == [
        "runs/eval/tiny-arithmetic",
        "runs/eval/tiny-gsm8k",
        "runs/eval/tiny-arithmetic/model=tiny_sft",  # whose name is tiny too
        "runs/eval/tiny-gsm8k/model=tiny_sft",
    ]


def test_a_path_without_a_choice_chooses_the_file(jobs):
    assert dirl("eval", "predictions=a.jsonl", "bench.path=b.json", "out=graded").exit_code == 0
    assert (jobs[-1]["bench"]["name"], jobs[-1]["bench"]["path"]) == ("b", "b.json")
    assert dirl("eval", "bench=gsm8k", "bench.path=c.json").exit_code == 0
    assert (jobs[-1]["bench"]["name"], jobs[-1]["bench"]["path"]) == ("gsm8k", "c.json")
    assert dirl("eval", "experiment=eval_paper", "bench.path=d.json", "model=tiny").exit_code == 0
    assert (jobs[-1]["bench"]["name"], jobs[-1]["bench"]["path"]) == ("math500", "d.json")
    assert dirl("generate", "model.path=some/model").exit_code == 0
    assert jobs[-1]["model"]["name"] == "some-model"


def test_what_only_looks_opens_no_run_directory(jobs, here):
    odd = "runs/eval/a/decoding.threshold=0.5"
    assert dirl("eval", f"compare=[{odd},b c/d]").exit_code == 0
    assert jobs[-1]["compare"] == [odd, "b c/d"]
    assert list(here.iterdir()) == []


PATHS_ONLY = ("file", "path", "rollouts", "from_causal", "livecodebench")  # choices that want a path
EXPERIMENTS = {
    "dirl8b_sft": "sft",
    "dirl8b_rl": "rl",
    "rl_1gpu": "rl",
    "tiny_sft": "sft",
    "tiny_rl": "rl",
    "tiny_dpo": "dpo",
    "tiny_eval": "eval",
    "tiny_generate": "generate",
    "tiny_chat": "chat",
    "sudoku_sft": "sft",
    "sudoku_rl": "rl",
    "countdown_sft": "sft",
    "countdown_rl": "rl",
    "eval_paper": "eval",
    "smollm2_convert": "sft",
    "smollm2_words": "sft",
    "smollm2_mixed": "sft",
    "smollm2_words_rl": "rl",
    "smollm2_gsm8k_rl": "rl",
}


def test_an_experiment_gives_way_to_the_command_line(jobs):
    cfg = compose_job("sft", "experiment=dirl8b_sft")
    assert (cfg.model.name, cfg.optim.lr, cfg.batch_size, cfg.schedule.warmup) == ("sdar8b", 1e-5, 512, 0.03)
    assert cfg.schedule._target_.endswith("Cosine") and cfg.masking._target_.endswith("PerBlock")
    mine = compose_job("sft", "experiment=dirl8b_sft", "model=tiny", "optim=muon", "steps=3", "schedule=constant")
    assert (mine.model.name, mine.steps, mine.optim.lr, mine.batch_size) == ("tiny", 3, 0.02, 512)
    static = compose_job("eval", "experiment=eval_paper", "decoding=static", "samples=2", "bench=arithmetic")
    assert (static.decoding.strategy, static.decoding.temperature) == ("low_confidence_static", 1.0)
    assert (static.samples, static.bench.name, static.decoding.max_new_tokens) == (2, "arithmetic", 8192)
    rl = compose_job("rl", "experiment=dirl8b_rl", "model=tiny", "data=arithmetic")
    assert (rl.rl.problems, rl.optim.lr, rl.model.path if "path" in rl.model else None) == (128, 1e-6, None)


def test_an_experiment_of_another_command_is_told(jobs):
    sentence = "dirl sft: experiment=eval_paper is for another command: dirl sft has no bench"
    assert refusal("sft", "experiment=eval_paper") == sentence
    sentence = "dirl download: data=arithmetic is for another command: dirl download has no instruction"
    assert refusal("download", "data=arithmetic") == sentence


def test_the_users_tree_wins(jobs, here):
    (here / "my" / "decoding").mkdir(parents=True)
    (here / "my/decoding/dynamic.yaml").write_text("strategy: mine.shadow\n")
    (here / "my/decoding/extra.yaml").write_text("strategy: mine.extra\n")
    assert dirl("generate", "-cd", "my").exit_code == 0
    assert dirl("generate", "-cd", "my", "decoding=extra").exit_code == 0
    assert dirl("generate").exit_code == 0
    assert [job["decoding"]["strategy"] for job in jobs] == ["mine.shadow", "mine.extra", "low_confidence_dynamic"]
    assert "decoding=extra" in complete_override("generate", [], "decoding=e", Path("my"))


def test_the_config_is_printed_instead_of_run(jobs):
    printed = dirl("sft", "--cfg", "job", "seed=5")
    assert yaml.safe_load(printed.stdout)["seed"] == 5
    assert "my-tree" not in dirl("sft", "--info", "searchpath").stdout
    assert dirl("sft", "-m", "--cfg", "job").exit_code == 2
    assert jobs == []


def test_a_sweep_over_models_may_be_verbose(jobs):
    assert dirl("sft", "-m", "model=tiny,tiny_sft", "hydra.verbose=true").exit_code == 0
    assert [cfg["model"]["name"] for cfg in jobs] == ["tiny", "tiny"]


def test_hydra_full_error_shows_where_a_sentence_comes_from(jobs):
    assert isinstance(dirl("sft", "seed=13", full_error="1").exception, DirlError)


def test_a_bug_is_shown_from_the_command_on(here):
    (here / "commands_of_mine.py").write_text(
        "import sys, types\n"
        "def run(cfg, out): raise ZeroDivisionError('a bug')\n"
        "sys.modules['dirl_cli.commands.generate'] = types.SimpleNamespace(run=run)\n"
        "sys.argv[1:] = ['generate']\n"
        "from dirl_cli.cli.app import app; app()\n"
    )
    result = subprocess.run([sys.executable, "commands_of_mine.py"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "commands_of_mine.py" in result.stderr and "ZeroDivisionError: a bug" in result.stderr
    assert "hydra" not in result.stderr


@pytest.mark.parametrize(("words", "word"), [(["model", "=", "s"], "model=s"), (["a=1", "model"], None), ([""], "")])
def test_bash_words_are_joined_again(words, word):
    assert rejoin(words)[-1] == (word if word is not None else ["a=1", "model"][-1])


def test_tab_completes_in_bash_and_zsh(here):
    bash = {"_DIRL_COMPLETE": "complete_bash", "COMP_WORDS": "dirl sft optim = mu", "COMP_CWORD": "4"}
    zsh = {"_DIRL_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "dirl sft optim=mu"}
    for shell, offered in [(bash, "muon"), (zsh, """_arguments '*: :(("optim=muon"))'""")]:
        completed = subprocess.check_output([Path(sys.executable).with_name("dirl")], env=os.environ | shell, text=True)
        assert offered in completed.splitlines()


def test_tab_offers_the_keys_of_the_chosen_group_and_the_models_trained_here(here):
    assert complete_override("sft", ["optim=muon"], "optim.m") == ["optim.momentum=0.95"]
    assert complete_override("sft", ["optim=adamw"], "optim.m") == []
    assert complete_override("sft", ["optim", "=", "adamw"], "schedule=co") == ["schedule=constant", "schedule=cosine"]
    (here / "runs/sft/mine/model").mkdir(parents=True)
    assert complete_override("eval", ["model", "="], "runs") == ["runs/sft/mine/model"]
    assert complete_override("eval", ["model=nonsense"], "sam") == []


def test_every_yaml_composes_and_builds():
    config_tree.prepare(None)
    surveyed = {command: config_tree.survey(command, ["model=tiny"])[0] for command in reversed(SCHEMAS)}
    values_only = {"decoding": [Decoding], "instruction": [Instruction]}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for group, name, command in {
            (group, name): (group, name, command)  # each choice once, in one of the commands that have it
            for command, groups in surveyed.items()
            for group, names in groups.items()
            for name in names
        }.values():
            path = [f"{group}.path=some/file.json"] if name in PATHS_ONLY else []
            path += ["data.sources=[{path: a.json, weight: 0.7}, {path: b.json}]"] if name == "mix" else []
            path += [f"{group}.task=basic_arithmetic"] if name == "gym" else []
            command = EXPERIMENTS[name] if group == "experiment" else command
            cfg = compose(command, [f"{group}={name}", *path, *(["model=tiny"] if group != "model" else [])])
            if name == "gym" and not find_spec("reasoning_gym"):
                continue
            for part in cfg if group == "experiment" else {group}:
                if part in values_only or (isinstance(cfg[part], DictConfig) and "_target_" in cfg[part]):
                    build(cfg[part], *values_only.get(part, []))


def test_build_names_the_key_that_is_wrong():
    good = {"_target_": "dirl_cli.diffusion.masking.Band", "low": 0.1, "high": 0.2}
    mix = {"_target_": "dirl_cli.data.files.Mix", "name": "mix"}
    assert build(OmegaConf.create(good)).high == 0.2
    for change, sentence in [
        ({"low": "wide"}, "masking.low=wide: give a number of at least 0 and at most 1"),
        ({"low": "???"}, "give a value for masking.low, such as masking.low=…"),
        ({"hihg": 0.5}, "masking.hihg: no such key; did you mean high?"),
        ({"_target_": "dirl_cli.diffusion.masking.Bnad"}, "did you mean Band?"),
        ({**mix, "sources": [{"pth": "a.json"}]}, "masking.pth: no such key; did you mean path?"),
        ({**mix, "sources": [{"weight": 1}]}, "give a value for masking.sources[0].path"),
        ({"_target_": "no.such.Thing"}, "masking._target_=no.such.Thing: No module named 'no'"),
        ({"_target_": "..a"}, "masking._target_=..a: "),
        ({"_target_": "a." * 3000 + "b"}, "masking._target_=a.a.a."),
    ]:
        with pytest.raises(DirlError) as error:
            build(OmegaConf.create({"masking": change if "sources" in change else good | change}).masking)
        assert sentence in str(error.value)


def test_tuples_stay_tuples():
    assert build(OmegaConf.create({"stop_token_ids": [1, 2]}), Decoding).stop_token_ids == (1, 2)


def test_long_names_are_cut_and_stay_apart():
    assert slug("a" * 300) != slug("a" * 299 + "b")
    assert len(slug("a" * 300)) <= 200


@pytest.mark.parametrize(
    ("finished", "left"),
    [("answers.jsonl", "what is finished is in runs/e, and the same command goes on"), (None, "nothing was finished")],
)
def test_ctrl_c_says_what_is_left_of_a_command(here, monkeypatch, finished, left):
    def run(cfg, out):
        if finished:
            (out / finished).touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "dirl_cli.commands.eval", SimpleNamespace(run=run))
    result = dirl("eval", "out=runs/e")
    assert (result.exit_code, result.stderr) == (130, f"dirl eval: stopped: {left}\n")
