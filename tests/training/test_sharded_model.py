"""Models that processes share from the moment they are there, beside the same ones loaded whole."""

import json

import pytest

from dirl_cli.models.load import DiffusionLM
from tests.helpers.loaded_shards import PEFT
from tests.helpers.processes import run_together
from tests.helpers.small import random_lm


def loaded(processes: int, *words: str) -> list[dict]:
    printed = run_together("tests.helpers.loaded_shards", [words] * processes, seconds=120)
    return [json.loads(text.splitlines()[-1]) for text in printed]


def is_all_the_same(found: dict) -> bool:
    return all(value for value in found.values() if isinstance(value, bool))


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("kind", "peft"), [("untied", "full"), ("tied", "full"), ("moe", "full"), ("moe", "lora"), ("untied", "qlora")]
)
def test_shards_together_are_the_model_that_one_process_loads_to_the_bit(tmp_path, kind, peft):
    """Experts lie in the files one by one, and are joined."""
    if peft == "qlora":
        pytest.importorskip("bitsandbytes")
    random_lm(kind).save(tmp_path / "model")
    for found in loaded(2, peft, str(tmp_path / "model")):
        assert is_all_the_same(found), found


@pytest.mark.timeout(200)
def test_an_adapter_is_merged_and_may_part_head_and_embedding(tmp_path):
    random_lm("tied").save(tmp_path / "model")
    lm = PEFT["lora"].load(random_source("tied"), "float32", "cpu", "sdpa")
    PEFT["lora"].save(lm, tmp_path / "adapter", str(tmp_path / "model"), "")
    for found in loaded(2, "full", str(tmp_path / "model"), str(tmp_path / "adapter")):
        assert is_all_the_same(found), found


def random_source(kind: str) -> object:
    class Source:
        def load(self, *_: str) -> DiffusionLM:
            return random_lm(kind)

    return Source()


@pytest.mark.timeout(200)
def test_what_keeps_the_first_from_loading_is_told_by_all(tmp_path):
    random_lm("untied").save(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"no tensors")
    for found in loaded(2, "full", str(tmp_path / "model")):
        assert "damaged weight file" in found["error"]
