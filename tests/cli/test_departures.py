"""The words that turn a command's defaults into a run's configuration are found again, from the configuration."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dirl_cli.cli import config_tree
from dirl_cli.cli.departures import departures
from dirl_cli.files import conf_dir


def settings(command, *words):
    """A configuration as a run saves it."""
    config_tree.prepare(None)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, list(words))
    config_tree.resolve(cfg)
    return OmegaConf.to_container(cfg)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rl", ["experiment=sudoku_rl", "algo=gspo", "decoding.denoising_steps=4", "seed=3"]),
        ("sft", ["experiment=tiny_sft", "optim=adamw", "optim.betas=[0.8,0.9]", "steps=7"]),
        ("rl", ["~experiment", "model=sdar8b", "data=bigmath", "algo=grpo", "algo.beta=0.25"]),
        ("eval", ["~experiment", "model=sdar8b", "bench=sudoku", "decoding=static"]),
    ],
)
def test_what_was_said_is_found_with_and_without_the_words(command, words):
    config = settings(command, *words)
    told = {word for word in words if not word.startswith("~")}
    for said in (words, [word for word in words if word.startswith(("experiment", "model"))]):
        found = set(departures(command, config, said))
        assert told <= found
        assert {word.partition("=")[0] for word in found - told} <= {"model"}


def test_a_model_by_path_is_told_as_it_is_said():
    config = settings("sft", "experiment=tiny_sft", "model=path", "model.path=runs/a/model")
    assert departures("sft", config, ["experiment=tiny_sft"]) == ["experiment=tiny_sft", "model=runs/a/model"]


def test_keys_of_another_version_are_no_failure():
    config = settings("sft", "experiment=tiny_sft") | {"of_yore": 1, "optim": "muon", "schedule": None}
    found = departures("sft", config, ["experiment=tiny_sft"])
    assert {"of_yore=1", "optim=muon", "schedule=null"} <= set(found)
    assert departures("sft", {"masking": 1, "model": "tiny"}, ["experiment=no_more"]) == []
