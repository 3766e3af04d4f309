"""What `dirl rl` tells the servers that it starts, and when it starts none."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dirl_cli.cli import run_dir
from dirl_cli.cli.build import build
from dirl_cli.commands import rl
from dirl_cli.commands.own_servers import require_no_others, require_servers, server_config
from dirl_cli.errors import DirlError
from tests.helpers.rl_runs import config


def of_run(*words):
    cfg = config("models/mine", "rollout=server", "rollout.servers=2", *words)
    return cfg, build(cfg.rollout)


def test_a_server_has_the_model_and_decoding_of_the_run_at_a_free_port_of_this_machine():
    cfg, engine = of_run("gpus=4", "rollout.max_batch=100", "dtype=bfloat16", "decoding.threshold=0.7")
    told = OmegaConf.create(OmegaConf.to_yaml(server_config(cfg, engine, tokens=600)))
    assert told.model == cfg.model and told.decoding.threshold == 0.7
    assert (told.dtype, told.device, told.attention) == ("bfloat16", "cpu", "auto")
    assert (told.serve.host, told.serve.port, told.serve.key) == ("127.0.0.1", 0, None)
    assert (told.serve.max_length, told.serve.name) == (600, cfg.model.name)
    assert (told.serve.max_queue, told.serve.timeout) == (256 + 4 * 100, 24 * 3600)
    assert (told.rollout._target_, told.rollout.max_batch) == ("dirl_cli.rollout.engines.Native", 100)


def test_a_server_has_the_engine_that_is_asked_for():
    cfg, engine = of_run("rollout.engine=lmdeploy")
    assert server_config(cfg, engine, 600).rollout._target_ == "dirl_cli.rollout.engines.Lmdeploy"


def test_other_servers_and_other_machines_are_told_in_one_sentence():
    _, engine = of_run("rollout.url=[http://a:8000]")
    with pytest.raises(DirlError, match=r"rollout\.url has others: give one of the two"):
        require_no_others(engine, nodes=1)
    _, engine = of_run()
    require_no_others(engine, nodes=1)
    with pytest.raises(DirlError, match="nodes=2: start them with `srun dirl serve`"):
        require_no_others(engine, nodes=2)


def test_a_run_that_has_neither_servers_nor_addresses_is_told_before_data_are_read():
    for choice in ("server", "sglang"):
        cfg = config("models/mine", f"rollout={choice}")
        with pytest.raises(DirlError, match=f"rollout={choice} wants .*addresses"):
            require_servers(build(cfg.rollout), nodes=1)
    cfg, _ = of_run("rollout.url=[http://a:8000]")
    with pytest.raises(DirlError, match="give one of the two"):
        rl.run(cfg, Path("never"))


def test_a_run_goes_on_with_more_servers_or_with_others():
    own, _ = of_run()
    for words in (["rollout.servers=4"], ["rollout.servers=null", "rollout.url=[http://a:8000]"]):
        other, _ = of_run(*words)
        before, after = (run_dir.flatten(OmegaConf.to_yaml(cfg)) for cfg in (own, other))
        assert before != after and not run_dir.differences(before, after, run_dir.Said((), ()))
