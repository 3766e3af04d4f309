"""Models that processes share from the moment they are there, beside the same ones loaded whole."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from dirl_cli.models.load import DiffusionLM
from tests.helpers.loaded_shards import PEFT
from tests.helpers.processes import run_together
from tests.helpers.small import random_lm

PACKED = "qlora,untied"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory of models, of which one cannot be read, and of an adapter for `tied`."""
    directory = tmp_path_factory.mktemp("models")
    for kind in ("untied", "tied", "moe"):
        random_lm(kind).save(directory / kind)
    lm = PEFT["lora"].load(random_source("tied"), "float32", "cpu", "sdpa")
    PEFT["lora"].save(lm, directory / "adapter", str(directory / "tied"), "")
    random_lm("untied").save(directory / "damaged")
    (directory / "damaged/model.safetensors").write_bytes(b"no tensors")
    return directory


def random_source(kind: str) -> object:
    class Source:
        def load(self, *_: str) -> DiffusionLM:
            return random_lm(kind)

    return Source()


@pytest.fixture(scope="module")
def found(models) -> list[dict[str, dict]]:
    """What each of two processes finds, by the words of a model: starting them takes longest."""
    cases = ["full,untied", "full,tied", "full,moe", "lora,moe", "full,tied,adapter", "full,damaged"]
    if find_spec("bitsandbytes"):
        cases.append(PACKED)
    words = []
    for case in cases:
        peft, *directories = case.split(",")
        words.append(",".join([peft, *(str(models / directory) for directory in directories)]))
    printed = run_together("tests.helpers.loaded_shards", [words] * 2, seconds=240)
    return [dict(zip(cases, json.loads(text.splitlines()[-1]), strict=True)) for text in printed]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["full,untied", "full,tied", "full,moe", "lora,moe", PACKED])
def test_shards_together_are_the_model_that_one_process_loads_to_the_bit(found, case):
    """Experts lie in the files one by one, and are joined."""
    if case == PACKED:
        pytest.importorskip("bitsandbytes")
    for own in found:
        assert is_all_the_same(own[case]), own[case]


@pytest.mark.timeout(300)
def test_an_adapter_is_merged_and_may_part_head_and_embedding(found):
    for own in found:
        assert is_all_the_same(own["full,tied,adapter"]), own["full,tied,adapter"]


def is_all_the_same(found: dict) -> bool:
    return len(found) > 1 and all(value is True for value in found.values())


@pytest.mark.timeout(300)
def test_what_keeps_the_first_from_loading_is_told_by_all(found):
    for own in found:
        assert "damaged weight file" in own["full,damaged"]["error"]
