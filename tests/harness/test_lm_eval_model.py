"""lm-eval's requests, against a slow version of each, and its tasks from YAML files of the test's own."""

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from dirl_cli.commands import eval as command
from dirl_cli.commands import eval_harness
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.harness_results import score_text, scores_of
from dirl_cli.files import conf_dir
from dirl_cli.harness.plugin import MODEL
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding
from tests.helpers.paths import ROOT
from tests.reference import likelihood as slow

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test installs it")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.tasks import TaskManager

from dirl_cli.harness import plugin, stop_strings
from dirl_cli.harness.lm_eval_model import DirlModel
from dirl_cli.harness.log_likelihoods import Scoring, TextScorer
from dirl_cli.harness.stop_strings import GenerationOptions, StopStringSampler, read_options

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 256}
QUESTION = "Tom has 7 pens. Tom buys 5. How many pens?"


@pytest.fixture(scope="module")
def model():
    return DirlModel(NativeSampler(Tiny(**SMALL).load("float32", "cpu")), Decoding(), Scoring(row_tokens=128))


def requests(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def scored(model, context, continuation):
    """The tokens of both, and which of them are scored; a space at the end of the context is the continuation's."""
    whole = model.tok_encode(context + continuation)
    start = len(model.tok_encode(context.rstrip()))
    return whole, [i >= start for i in range(len(whole))]


def test_log_likelihoods_are_those_of_one_forward_for_each_token(model):
    pairs = [(QUESTION, " 12"), (QUESTION, " 7 pens"), ("Tom has ", "7")]
    for pair, (nats, is_greedy) in zip(pairs, model.loglikelihood(requests("loglikelihood", *pairs)), strict=True):
        assert nats == pytest.approx(slow.left_to_right(model.lm, *scored(model, *pair)), abs=1e-4)
        assert not is_greedy  # of 373 tokens none of a random model is the right one by chance


def test_what_greedy_decoding_says_is_greedy(model):
    token_ids = model.tok_encode(QUESTION)
    start = len(token_ids)
    first = start // 4 * 4
    best = slow.block_logprobs(model.lm, token_ids, first, set())[start - first].argmax()
    instance = (("", ""), token_ids, [int(best)])
    assert model._loglikelihood_tokens([instance])[0][1]


def test_the_elbo_is_told_with_its_standard_error_and_choices_share_their_masks(model):
    elbo = DirlModel(model.sampler, Decoding(), Scoring("elbo", draws=60, rates=4, row_tokens=256))
    [(nats, _)] = elbo.loglikelihood(requests("loglikelihood", (QUESTION, " 12 pens")))
    exact = slow.elbo(model.lm, *scored(model, QUESTION, " 12 pens"))
    assert abs(nats - exact) < 4 * elbo.facts()["elbo_standard_error"]

    few = DirlModel(model.sampler, Decoding(), Scoring("elbo", draws=2, rates=4, row_tokens=256))
    same = few.loglikelihood(requests("loglikelihood", (QUESTION, " 12 pens"), (QUESTION, " 12 pens")))
    assert same[0] == pytest.approx(same[1], abs=1e-4)


def test_rolling_scores_every_token_of_a_text_once(model):
    text = f"{QUESTION} 12"
    token_ids = model.tok_encode(text)
    [whole] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert whole == pytest.approx(
        slow.left_to_right(model.lm, [model.eot_token_id, *token_ids], [False] + [True] * len(token_ids)), abs=1e-4
    )


def test_a_text_ends_before_the_first_of_its_stop_strings(model, monkeypatch):
    monkeypatch.setattr(stop_strings, "FIRST_STRETCH", 4)
    [[sampled]] = model.sampler.sample([model.tok_encode(QUESTION)], 1, replace(model.decoding, max_new_tokens=48))
    whole = model.tokenizer.decode(sampled.completion_ids, skip_special_tokens=True)
    stop = whole[10:13]
    options = {"until": ["never said", stop], "max_gen_toks": 48}

    asked = []
    real = model.sampler.stream

    def counted(prompts, n, decoding, **given):
        asked.append(decoding.max_new_tokens)
        return real(prompts, n, decoding, **given)

    monkeypatch.setattr(model.sampler, "stream", counted)
    [text] = model.generate_until(requests("generate_until", (QUESTION, options)))
    assert text == whole[: whole.index(stop)]
    assert asked[:2] == [4, 4] and sum(asked) < 48  # it goes on only until the string is there


def test_stretches_of_an_answer_are_what_one_answer_would_be(model, monkeypatch):
    monkeypatch.setattr(stop_strings, "FIRST_STRETCH", 5)
    [[sampled]] = model.sampler.sample([model.tok_encode(QUESTION)], 1, replace(model.decoding, max_new_tokens=30))
    whole = model.tokenizer.decode(sampled.completion_ids[:30], skip_special_tokens=True)
    [text] = model.generate_until(requests("generate_until", (QUESTION, {"until": [], "max_gen_toks": 30})))
    assert text == whole


def test_several_answers_to_a_question_differ_where_they_are_drawn(model):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    texts = model.generate_until(requests("generate_until", *[(QUESTION, options)] * 3))
    assert len(set(texts)) == 3
    assert model.generate_until(requests("generate_until", *[(QUESTION, options)] * 3)) == texts


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"until": "\n"}, GenerationOptions(("\n",))),
        ({"until": ["a", ""], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}, GenerationOptions(("a",), 9)),
        ({"max_length": 99, "max_tokens": "7"}, GenerationOptions(max_new_tokens=7)),
        (
            {"do_sample": True, "temperature": 0.5, "top_p": 0.9},
            GenerationOptions(sampling=(("temperature", 0.5), ("top_p", 0.9))),
        ),
        ({"temperature": 0.0}, GenerationOptions()),
    ],
)
def test_options_of_a_task_are_read_as_lm_eval_means_them(options, read):
    assert read_options(options) == read


def test_an_option_that_a_sampler_does_not_have_is_told():
    with pytest.raises(DirlError, match=r"generation option num_beams=4: .* leave it out"):
        read_options({"num_beams": 4})


def test_the_chat_template_is_applied_as_lm_eval_asks(model):
    turns = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(turns) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = [*turns, {"role": "assistant", "content": "The answer is"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nThe answer is")


def test_model_args_choose_the_model_its_decoding_and_its_scoring(here, model):
    model.lm.save(here / "model")
    given = f"model={here}/model,threshold=0.5,likelihood=elbo,draws=2"
    made = DirlModel.create_from_arg_string(given, {"batch_size": "3", "max_batch_size": None, "device": "cuda:0"})
    assert (made.decoding.threshold, made.text_scorer.scoring.likelihood, made.text_scorer.scoring.draws) == (
        0.5,
        "elbo",
        2,
    )
    assert made.sampler.max_batch == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("treshold=0.5", "treshold=…: did you mean threshold?"),
        ("threshold=0.5", "name a model: --model_args model=DIRECTORY"),
    ],
)
def test_model_args_that_do_not_fit_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(DirlError, match=sentence.replace("?", r"\?")):
        DirlModel.create_from_arg_string(arguments)


def test_the_line_in_the_wheel_registers_the_model_where_lm_eval_is_started(monkeypatch):
    line = (ROOT / "src" / "dirl_lm_eval.pth").read_text().strip()
    assert line.startswith("import ") and "\n" not in line  # as Python's `site` asks
    called = []
    monkeypatch.setattr(plugin, "register", lambda: called.append(1))
    for words, times in ((["python", "/venv/bin/dirl", "eval"], 0), (["python", "/venv/bin/lm_eval", "--model"], 1)):
        monkeypatch.setattr(sys, "orig_argv", words)
        exec(line)
        assert len(called) == times
    monkeypatch.undo()

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(model_registry, "_objs", dict(model_registry._objs))
    plugin.register()
    assert get_model("dirl") is DirlModel and "hf" in model_registry
    assert f"{DirlModel.__module__}:{DirlModel.__name__}" == MODEL


def test_an_error_that_a_user_can_fix_ends_lm_eval_in_a_sentence(capsys):
    plugin.report_error(DirlError, DirlError("name a model"), None)
    assert capsys.readouterr().err == "lm_eval: name a model\n"


# Tasks of the test's own, and the command.

CHOICE = """
task: pens_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWER = """
task: pens_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
TEXT = """
task: pens_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture
def config(here, monkeypatch):
    """The config of three tasks on a small model; lm-eval's own tasks, thousands of files, are left out."""
    rows = [
        {"question": QUESTION, "answer": "12", "choices": [" 12", " 7", " 35"], "gold": 0},
        {"question": "Ann has 3 nuts. How many nuts?", "answer": "3", "choices": [" 3", " 4", " 5"], "gold": 0},
    ]
    data = here / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("text", TEXT)):
        (here / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    monkeypatch.setattr(
        eval_harness, "task_manager", lambda folder: TaskManager(include_path=folder, include_defaults=False)
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs programs for seconds
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        words = ["harness=[pens_choice,pens_answer,pens_text]", f"harness_settings.tasks_from={here}/tasks"]
        words += [f"+model.{key}={value}" for key, value in SMALL.items()]
        cfg = compose("eval", words)
    (here / "out").mkdir()
    return cfg


def test_the_command_leaves_scores_with_tokens_per_forward_beside_them(config, here, capsys):
    command.run(config, here / "out")
    card = json.loads((here / "out" / "eval_card.json").read_text())
    assert card["results"].keys() == {"pens_choice", "pens_answer", "pens_text"}
    assert card["facts"]["answers"] == 2 and card["facts"]["tokens_per_forward"] >= 1
    [line] = csv.DictReader((here / "out" / "harness.csv").open())
    assert float(line["pens_text bits_per_byte"]) == pytest.approx(card["results"]["pens_text"]["bits_per_byte,none"])

    lm = Tiny(**SMALL).load("float32", "cpu")
    template = DirlModel(NativeSampler(lm), Decoding(), Scoring()).apply_chat_template
    samples = [json.loads(line) for line in (here / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["task"] for sample in samples].count("pens_choice") == 2
    assert template([{"role": "user", "content": QUESTION}]) in json.dumps(samples, ensure_ascii=False).replace(
        "\\n", "\n"
    )
    shown = capsys.readouterr().out
    assert "pens_choice acc_norm" in shown and "per forward, over the 2 answers sampled now" in shown


def test_what_is_answered_already_is_not_asked_again(config, here, monkeypatch):
    command.run(config, here / "out")
    before = json.loads((here / "out" / "eval_card.json").read_text())
    monkeypatch.setattr(TextScorer, "_score_batch", None)
    monkeypatch.setattr(NativeSampler, "stream", None)
    command.run(config, here / "out")
    after = json.loads((here / "out" / "eval_card.json").read_text())
    assert before["results"] == after["results"] and after["facts"] == {}
    assert before["record"]["date"] and before["record"] == after["record"]


@pytest.mark.parametrize("sampling", ["temperature: 1.0", "do_sample: true, temperature: 1.0"])
def test_repeats_of_a_sampled_task_are_kept_apart_and_taken_up_after_an_interruption(
    config, here, monkeypatch, sampling
):
    task = ANSWER.replace("max_gen_toks: 12", f"max_gen_toks: 12, {sampling}") + "repeats: 3\n"
    (here / "tasks" / "answer.yaml").write_text(task.format(data=here / "rows.jsonl"))
    config.harness = ["pens_answer"]

    def texts(folder):
        command.run(config, here / folder)
        lines = (here / folder / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["answers"] for line in lines]

    (here / "whole").mkdir()
    whole = texts("whole")
    assert all(len(set(answers)) == 3 for [answers] in whole)

    real = StopStringSampler.sample
    ended = []

    def interrupted(self, *given):
        for answer in real(self, *given):
            yield answer
            ended.append(answer)
            if len(ended) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(StopStringSampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(config, here / "out")
    ended.clear()
    monkeypatch.setattr(StopStringSampler, "sample", real)
    assert texts("out") == whole
    card = json.loads((here / "out" / "eval_card.json").read_text())
    assert card["facts"]["answers"] == 2

    monkeypatch.setattr(NativeSampler, "stream", None)
    assert texts("out") == whole


def test_a_text_with_nothing_to_score_is_worth_nothing(model):
    for likelihood in ("left_to_right", "elbo"):
        scoring = DirlModel(model.sampler, Decoding(), Scoring(likelihood, draws=2, rates=2, row_tokens=128))
        assert scoring.loglikelihood_rolling(requests("loglikelihood_rolling", ("",), (QUESTION,)))[0] == 0
        assert scoring._loglikelihood_tokens([((QUESTION, ""), model.tok_encode(QUESTION), [])]) == [(0, True)]


def test_an_unknown_task_is_told_with_the_nearest(config, here):
    config.harness = ["pens_chioce"]
    with pytest.raises(DirlError, match=r"harness=pens_chioce: lm-eval has no such task; did you mean pens_choice\?"):
        command.run(config, here / "out")


def test_a_sweep_of_tasks_ends_in_one_file(config, here, capsys):
    command.run(config, here / "out")
    command.after_sweep("seeds", [(["seed=0"], here / "out"), (["seed=1"], here / "out")])
    assert [line["run"] for line in csv.DictReader((here / "seeds.csv").open())] == ["seed=0", "seed=1"]


def test_scores_are_told_with_their_standard_error_where_there_is_one():
    results = {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "sample_len": 4}
    }
    [score] = scores_of(results)
    assert (score.metric, score.filter, score_text(score)) == ("exact_match", "strict", "0.5000 ± 0.1000")
    [score] = scores_of({"wiki": {"bits_per_byte,none": 1.25, "bits_per_byte_stderr,none": "N/A"}})
    assert score_text(score) == "1.2500"


def test_without_lm_eval_the_extra_is_named(config, monkeypatch):
    monkeypatch.setattr(eval_harness, "find_spec", lambda name: None)
    with pytest.raises(DirlError, match="wants lm-evaluation-harness: pip install "):
        eval_harness.require_harness(config)


@pytest.mark.parametrize(("key", "value"), [("samples", 4), ("ids", ["a"]), ("predictions", "a.jsonl"), ("gpus", 2)])
def test_settings_that_tasks_have_no_use_for_are_told(config, key, value):
    config[key] = value
    with pytest.raises(DirlError, match=rf"{key}|harness=… runs in one process"):
        eval_harness.require_harness(config)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            FileNotFoundError("Unable to find 'pens.jsonl'\nat all"),
            r"\(Unable to find 'pens.jsonl'\): .* once where the Hub",
        ),
        (
            ModuleNotFoundError("No module named 'langdetect'"),
            r"not here \(No module named 'langdetect'\): .*'lm-eval\[",
        ),
    ],
)
def test_what_a_task_lacks_is_told_with_what_brings_it(config, monkeypatch, error, sentence):
    def fail(**settings):
        raise error

    monkeypatch.setattr("lm_eval.simple_evaluate", fail, raising=False)
    with pytest.raises(DirlError, match=sentence):
        eval_harness.run_tasks(config, SimpleNamespace(), None)


def test_a_task_that_runs_code_is_refused_in_a_sentence(config, here, monkeypatch):
    def refuse(**settings):
        raise ValueError("Attempted to run task: humaneval which is marked as unsafe.")

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse, raising=False)
    with pytest.raises(DirlError, match=r"runs the code that the model writes: give harness_settings\.run_code=true"):
        eval_harness.run_tasks(config, SimpleNamespace(), None)
