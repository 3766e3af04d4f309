"""Configurations of small runs of `dirl sft`."""

from omegaconf import DictConfig

from tests.helpers.rl_runs import composed

SMALL = (
    "+model.hidden_size=32",
    "+model.num_hidden_layers=1",
    "+model.intermediate_size=32",
    "data.train=40",
    "data.held_out=4",
    "data.test=4",
    "steps=6",
    "batch_size=8",
    "save_every=2",
    "log_every=1",
    "eval_problems=2",
    "decoding.max_new_tokens=4",
    "device=cpu",
)


def config(*words: str) -> DictConfig:
    return composed("sft", *SMALL, *words)
