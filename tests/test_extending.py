"""What the page on extending writes into files works, and the example of the concepts prints what they show."""

import re
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dirl_cli.cli import config_tree
from dirl_cli.cli.build import build
from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.files import conf_dir
from dirl_cli.models.load import SavedModel
from dirl_cli.models.tiny import Tiny
from dirl_cli.reward.verifiers import verifier_of
from dirl_cli.types import Trajectory
from tests.helpers.pages import code_blocks, files, page


@pytest.fixture
def written(here, monkeypatch):
    """The page's files, in a directory of their own, whose modules are found."""
    for name, text in files(page("extending")).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    monkeypatch.syspath_prepend(here)
    before = set(sys.modules)
    yield here
    config_tree.prepare(None)
    config_tree.UserConfigs.directory = None
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def composed(command, *words):
    config_tree.prepare(Path("my_conf"))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, list(words))
    OmegaConf.resolve(cfg)
    return cfg


def test_the_views_of_the_page_take_later_steps_for_one(written):
    views = build(composed("rl", "algo=coarse").algo).views
    answer = Trajectory(prompt_ids=[5, 5, 5, 5], token_ids=[1, 2, 3, 4], reveal_step=[3, 1, 2, 4])
    strip = views(answer, BlockSpec(block_size=4, mask_id=0), torch.Generator())
    assert [strip.token_ids[strip.view == view].tolist() for view in (1, 2)] == [[0, 0, 0, 0], [0, 2, 0, 0]]
    assert sorted(strip.targets.tolist()) == [1, 2, 3, 4]


def test_the_task_of_the_page_is_data_and_benchmark_whose_own_answers_are_right(written):
    data = build(composed("sft", "data=backwards", "data.train=20", "data.test=5").data)
    bench = build(composed("eval", "bench=backwards", "bench.test=5").bench)
    asked = {row.fields["messages"][0]["content"] for row in data.demonstrations()}
    problems = bench.problems()
    assert len(asked) == 20 and len(problems) == 5
    assert not asked & {problem.question for problem in problems}

    problem = problems[0]
    verifier = verifier_of(problem)
    assert problem.answer == problem.question[::-1]
    credits = [verifier.credit(problem, verifier.extract(text)) for text in (problem.answer, problem.question)]
    assert credits == [1, 0]


def test_the_draws_of_the_task_depend_on_the_generator_alone(written):
    game = build(composed("sft", "data=backwards").data).game
    assert game.draw(Random(1)) == game.draw(Random(1)) != game.draw(Random(2))


def test_the_model_of_the_page_is_the_mean_of_others(written):
    for seed in (1, 2):
        tiny = Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32, seed=seed)
        tiny.load("float32", "cpu").save(Path(f"m{seed}"))
    cfg = composed("eval", "model=soup", "~experiment", "model.paths=[m1,m2]")
    soup = build(cfg.model).load("float32", "cpu").model.state_dict()
    parts = [SavedModel(path, path).load("float32", "cpu").model.state_dict() for path in ("m1", "m2")]
    for name, mean in soup.items():
        assert torch.allclose(mean, (parts[0][name] + parts[1][name]) / 2, atol=1e-7), name


def test_the_trace_of_the_concepts_has_the_views_that_they_show(capsys):
    [code] = code_blocks("python", page("concepts"))
    exec(code, {})
    assert re.search(r"```text\n(.*?)```", page("concepts"), re.S)[1] == capsys.readouterr().out
