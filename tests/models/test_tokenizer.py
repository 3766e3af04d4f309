"""The released tokenizer, in the forms that repositories hold it in: the mask token goes by its id."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, SavedModel
from tests.helpers.small import published_vocabulary

PAD, TURN_START, TURN_END, THINK, MASK = 151643, 151644, 151645, 151667, 151669
CHAT = [{"role": "user", "content": "Solve $x^2 = 1234$."}]


def load(path: Path) -> DiffusionLM:
    return SavedModel("mine", str(path)).load("float32", "cpu")


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory) -> Path:
    """A random model of the published vocabulary with the files of the published tokenizer: vocab.json, merges.txt."""
    directory = published_vocabulary(tmp_path_factory.mktemp("published") / "model", shared)
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    assert not (directory / "tokenizer.json").exists()
    return directory


@pytest.fixture(scope="module")
def texts(shared) -> list[str]:
    problems = json.loads((shared / "data/MATH500.json").read_text())[:50]
    turns = ["<|im_start|>user\nHi<|im_end|>\n<think>hm</think>", "½ Ünïcode 日本語 e\u0301 \n\n   x\t12345"]
    return [problem["question"] for problem in problems] + turns


@pytest.fixture(scope="module")
def ids(published, texts) -> list[list[int]]:
    return load(published).tokenizer(texts)["input_ids"]


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_published_files_give_the_ids_of_the_method(published):
    lm = load(published)
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<|MASK|>"]
    assert lm.tokenizer.convert_tokens_to_ids(named) == [PAD, TURN_START, TURN_END, THINK, MASK]
    assert (lm.mask_token_id, lm.pad_token_id, lm.stop_token_ids) == (MASK, PAD, (PAD, TURN_END))
    assert lm.unsampled_ids == tuple(range(MASK, 151936))


def other_spelling(directory: Path) -> None:
    def change(config: dict) -> None:
        config["added_tokens_decoder"][str(MASK)]["content"] = config["mask_token"] = "<MASK>"

    edit(directory / "tokenizer_config.json", change)


def two_spellings(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", lambda config: config.update(mask_token="<MASK>"))


def no_mask(directory: Path) -> None:
    def change(config: dict) -> None:
        del config["added_tokens_decoder"][str(MASK)], config["mask_token"]
        config["additional_special_tokens"].remove("<|MASK|>")

    edit(directory / "tokenizer_config.json", change)


def no_class(directory: Path) -> None:
    edit(directory / "tokenizer_config.json", lambda config: config.pop("tokenizer_class"))


def no_configuration(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()


def fast_only(directory: Path) -> None:
    load(directory).tokenizer.save_pretrained(directory)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (directory / name).unlink()


@pytest.mark.parametrize("form", [other_spelling, two_spellings, no_mask, no_class, no_configuration, fast_only])
def test_the_same_texts_have_the_same_ids_and_the_mask_is_never_sampled_in_every_form(copy, form, texts, ids):
    form(copy)
    lm = load(copy)
    assert lm.tokenizer(texts)["input_ids"] == ids
    assert (lm.mask_token_id, lm.pad_token_id, lm.stop_token_ids) == (MASK, PAD, (PAD, TURN_END))
    assert lm.unsampled_ids == tuple(range(MASK, 151936))


def test_code_in_a_checkpoint_is_never_run(copy, monkeypatch):
    for name in ("remote.py", "tokenization_qwen2.py"):
        (copy / name).write_text("raise SystemExit('this code ran')")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    load(copy).save(copy.with_name("saved"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((copy.with_name("saved") / name).read_text())


@pytest.mark.parametrize(
    ("file", "sentence"), [("config.json", "is not a model"), ("tokenizer_config.json", "the tok")]
)
def test_what_needs_code_of_its_own_is_told_in_one_sentence(copy, monkeypatch, file, sentence):
    (copy / "remote.py").write_text("raise SystemExit('this code ran')")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    change = {"model_type": "strange"} if file == "config.json" else {"tokenizer_class": "Strange"}
    edit(copy / file, lambda config: config.update(change))
    with pytest.raises(DirlError, match=sentence) as told:
        load(copy)
    assert "\n" not in str(told.value)


def test_a_saved_tokenizer_is_the_same_with_its_template_and_special_tokens(published, tmp_path, texts, ids):
    lm = load(published)
    lm.save(tmp_path / "saved")
    lm = load(tmp_path / "saved")
    assert lm.tokenizer(texts)["input_ids"] == ids
    assert lm.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nSolve $x^2 = 1234$.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (lm.mask_token_id, lm.pad_token_id, lm.stop_token_ids) == (MASK, PAD, (PAD, TURN_END))
    config = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    published_config = json.loads((published / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == published_config["additional_special_tokens"]
    same = ("eos_token", "pad_token", "mask_token", "tokenizer_class", "model_max_length", "bos_token", "unk_token")
    assert {name: config[name] for name in same} == {name: published_config[name] for name in same}
    assert not config.keys() & {"is_local", "local_files_only", "extra_special_tokens"}
