"""Configurations of small runs of `dirl sft`."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli import schema
from dirl_cli.files import conf_dir

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
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("sft", [*SMALL, *words])
    OmegaConf.resolve(cfg)
    return cfg
