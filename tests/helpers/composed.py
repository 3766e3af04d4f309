"""The config of a command as Hydra composes it, for tests that hand it to the command themselves."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dirl_cli.cli import schema
from dirl_cli.cli.config_tree import preset
from dirl_cli.cli.overrides import drop_preset
from dirl_cli.files import conf_dir


def composed(name: str, *words: str) -> DictConfig:
    """conf/`name`.yaml under overrides, of which a model of one's own drops the preset."""
    schema.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(name, drop_preset(list(words), preset(name)))
    OmegaConf.resolve(cfg)
    return cfg
