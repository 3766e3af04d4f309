"""Models on disk: published configurations and names, bit-identical round trips, one sentence for what is damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3MoeForCausalLM,
)

from dirl_cli import Decoding, load_sampler, score
from dirl_cli.cli.build import build
from dirl_cli.diffusion.layout import Coordinates
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.attention import dense_mask
from dirl_cli.models.load import DiffusionLM, SavedModel, diffusion_lm, pick_device
from dirl_cli.models.low_precision import inference_model
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from dirl_cli.models.tiny import Tiny, train_tokenizer
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.export import save_model
from dirl_cli.training.logprobs import trajectory_logprobs
from tests.helpers.answers import slopes
from tests.helpers.small import EXPERTS, MASK, PAD, SIZES, small_lm

OPTIONS = Decoding(temperature=1.0, max_new_tokens=9, strategy="sequential")
PROMPTS = [[5, 6, 7], [11] * 9]


def load(path: Path, **named: int) -> DiffusionLM:
    return SavedModel("mine", str(path), **named).load("float32", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small model in the published layout, without a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "small"
    small_lm().save(directory)
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# What is saved


def test_the_configuration_says_what_published_ones_say_and_what_the_method_needs(saved):
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sdar", ["SDARForCausalLM"])
    assert (config["block_size"], config["mask_token_id"]) == (4, MASK)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["torch_dtype"] == "float32"
    assert "auto_map" not in config


def test_plain_transformers_loads_what_was_saved(saved):
    code = f"""
import sys, torch
from transformers import Qwen3ForCausalLM
model, found = Qwen3ForCausalLM.from_pretrained({str(saved)!r}, output_loading_info=True)
assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
assert "dirl_cli" not in sys.modules
print(model(torch.arange(5, 9)[None]).logits.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load(saved).model(torch.arange(5, 9)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_save_leaves_the_model_that_was_there(saved, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    before = (directory / "model.safetensors").read_bytes()
    other = small_lm(seed=1)
    monkeypatch.setattr(other.model, "save_pretrained", lambda path, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(other, torch.float32, directory, "", Accelerator(cpu=True))
    assert (directory / "model.safetensors").read_bytes() == before
    save_model(small_lm(seed=1), torch.float32, directory, "# Another\n", Accelerator(cpu=True))
    assert (directory / "model.safetensors").read_bytes() != before
    assert (directory / "README.md").read_text() == "# Another\n"


def test_a_tied_head_is_stored_once_and_samples_the_same_when_it_comes_back(tmp_path):
    lm = Tiny(hidden_size=32, num_hidden_layers=1, intermediate_size=32).load("float32", "cpu")
    lm.save(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    back = load(tmp_path / "tied")
    embedding, head = back.model.get_input_embeddings().weight, back.model.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()
    assert NativeSampler(back).sample(PROMPTS, 1, OPTIONS) == NativeSampler(lm).sample(PROMPTS, 1, OPTIONS)
    assert back.tokenizer.chat_template == lm.tokenizer.chat_template
    assert (back.stop_token_ids, back.unsampled_ids) == (lm.stop_token_ids, lm.unsampled_ids)


def test_an_untied_head_comes_back_apart(saved):
    model = load(saved).model
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()


def test_the_embedded_model_is_the_same_for_the_same_seed_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (Tiny(seed=seed).load("float32", "cpu").model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# What is registered


def test_a_dense_and_a_mixture_model_load_by_their_type_without_remote_code(saved, tmp_path):
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is SDARForCausalLM
    config = SDARMoeConfig(**SIZES, **EXPERTS, mask_token_id=MASK)
    torch.manual_seed(0)
    SDARMoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    lm = load(tmp_path / "moe")
    assert type(lm.model) is SDARMoeForCausalLM and lm.model.config.model_type == "sdar_moe"
    with torch.device("meta"):
        assert lm.model.state_dict().keys() == Qwen3MoeForCausalLM(config).state_dict().keys()
    trajectories = [group[0] for group in NativeSampler(lm).sample(PROMPTS, 1, OPTIONS)]
    for trajectory, logprobs in zip(trajectories, trajectory_logprobs(lm, trajectories, OPTIONS), strict=True):
        assert trajectory.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize(("name", "parameters"), [("SDAR-4B-Chat", 4_411_424_256), ("SDAR-8B-Chat", 8_190_735_360)])
def test_published_configurations_load_with_as_many_parameters_as_published(shared, tmp_path, name, parameters):
    shutil.copy(shared / f"models/configs/{name}.json", tmp_path / "config.json")
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert type(model) is SDARForCausalLM
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# Block size and mask token


def test_block_size_and_mask_token_come_from_either_side_and_default_to_the_published_ones(copy):
    assert (load(copy).block_size, load(copy).mask_token_id) == (4, MASK)
    assert load(copy, block_size=4, mask_token_id=MASK).block_size == 4
    edit_config(copy, block_size=None, mask_token_id=None)
    asked = load(copy, block_size=8, mask_token_id=3)
    assert (asked.block_size, asked.mask_token_id, asked.unsampled_ids) == (8, 3, (3,))
    assert load(copy, mask_token_id=3).block_size == 4
    with pytest.raises(DirlError, match=r"mask token 9999 is outside the vocabulary of .*: set model.mask_token_id"):
        load(copy, mask_token_id=9999)


def test_a_model_without_a_mask_token_may_be_a_causal_one_that_has_to_learn_blocks(copy):
    edit_config(copy, block_size=None, mask_token_id=None)
    with pytest.raises(DirlError, match=r"has no 151669: a causal model learns .* `dirl sft model=from_causal"):
        load(copy)


def test_another_mask_token_than_the_checkpoints_is_refused(saved):
    with pytest.raises(DirlError, match=f"mask_token_id is 3 and the checkpoint's is {MASK}: leave"):
        load(saved, mask_token_id=3)


def test_another_block_size_than_the_checkpoints_is_taken_and_saved(saved, tmp_path):
    lm = load(saved, block_size=8)
    lm.save(tmp_path / "larger")
    assert (lm.block_size, load(saved).block_size, load(tmp_path / "larger").block_size) == (8, 4, 8)


def test_a_block_has_at_least_one_token(copy):
    edit_config(copy, block_size=0)
    with pytest.raises(DirlError, match="block_size is 0: it must be at least 1"):
        load(copy)


# What is missing or damaged


def without_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def into_shards(directory: Path) -> Path:
    """The first of them."""
    small_lm().model.save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink()
    return min(directory.glob("model-*.safetensors"))


def shard_truncated(directory: Path) -> None:
    shard = into_shards(directory)
    shard.write_bytes(shard.read_bytes()[:-4])


def shard_without_a_tensor_of_the_index(directory: Path) -> None:
    shard = into_shards(directory)
    tensors = load_file(shard)
    tensors.pop(min(tensors))
    save_file(tensors, shard, metadata={"format": "pt"})


def index_without_files(directory: Path) -> None:
    into_shards(directory)
    (directory / "model.safetensors.index.json").write_text("{}")


def stray_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors") | {"value_head.weight": torch.zeros(1)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def with_value(directory: Path, value: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def with_a_token_too_many(directory: Path) -> None:
    """As whoever adds one without resizing the embedding leaves it."""
    tokenizer = train_tokenizer(["a"])
    tokenizer.add_tokens([f"<|filler_{i}|>" for i in range(500 - len(tokenizer))])
    tokenizer.save_pretrained(directory)
    edit_config(directory, vocab_size=500)
    tensors = load_file(directory / "model.safetensors")
    grown = {name: torch.zeros(500, 32) if tensor.shape[0] == 50 else tensor for name, tensor in tensors.items()}
    save_file(grown, directory / "model.safetensors", metadata={"format": "pt"})
    load(directory)
    tokenizer.add_tokens(["<|user_tool|>"])
    tokenizer.save_pretrained(directory)


DAMAGES = {
    "lacks 1 tensor of the model, such as model.layers.0.mlp.up_proj.weight: download": without_tensor,
    "holds a damaged weight file .*: download or copy it again": truncated,
    "is not a model that can be loaded .No such file .*model-00001.*: give another, or": lambda d: into_shards(
        d
    ).unlink(),
    "holds a damaged weight file .*file not fully covered.*: download": shard_truncated,
    "lacks 1 tensor of the model, such as .*: download": shard_without_a_tensor_of_the_index,
    "cannot be loaded as its config.json and index say .'weight_map'.: download or copy": index_without_files,
    "holds 1 tensor that its config.json does not know, such as value_head.weight: download or copy": stray_tensor,
    "holds 11 tensors that its config.json does not know, such as model.layers.1": lambda d: edit_config(
        d, num_hidden_layers=1
    ),
    "cannot be loaded as its config.json and index say .list index out of range": lambda d: edit_config(
        d, num_hidden_layers=3
    ),
    "is not a model that can be loaded .Error no file named model.safetensors": lambda d: (
        d / "model.safetensors"
    ).unlink(),
    "holds no config.json, so it is no saved model: give one": lambda d: (d / "config.json").unlink(),
    "config.json is damaged .Expecting property": lambda d: (d / "config.json").write_text("{"),
    "is not a model that can be loaded .module 'torch' has no attribute 'float3r'": lambda d: edit_config(
        d, dtype="float3r", torch_dtype="float3r"
    ),
    "config.json is damaged .it is no JSON object": lambda d: (d / "config.json").write_text("[]"),
    "is not a model that can be loaded .Validation error": lambda d: edit_config(d, hidden_size="a"),
    r"holds .* with shape \(50, 32\), and its config.json asks for \(50, 64\)": lambda d: edit_config(
        d, hidden_size=64
    ),
    "is not a model that can be loaded .The checkpoint": lambda d: edit_config(d, model_type="other"),
    "config.json names no model_type, such as sdar: download": lambda d: edit_config(d, model_type=None),
    "holds nan or inf in model.layers.1.mlp.up_proj.weight: download": lambda d: with_value(d, torch.nan),
    "holds nan or inf in model.layers.1.mlp.up_proj.weight: .*": lambda d: with_value(d, -torch.inf),
    r"knows '<\|user_tool\|>' as token 500, and the model has 500: resize": with_a_token_too_many,
    "the tokenizer of .* cannot be read": lambda d: (d / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_damaged_model_is_told_in_one_sentence(copy, sentence, capfd):
    DAMAGES[sentence](copy)
    with pytest.raises(DirlError, match=sentence) as told:
        load(copy)
    assert "\n" not in str(told.value) and str(copy) in str(told.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere", "nowhere is not a directory: give model.path that of a saved model"),
        ("./no/where", "./no/where is not a directory"),
        (__file__, "is not a directory"),
        ("JetLM/SDAR-4B-Chat", "is not on this machine: run `dirl download model=sdar4b` first"),
    ],
)
def test_a_model_that_is_not_there_is_told_with_the_remedy(path, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DirlError, match=sentence):
        SavedModel("mine", path).load("float32", "cpu")


def test_a_model_that_a_command_leaves_behind_is_told_with_that_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"tiny_sft": "", "dirl8b_sft": " experiment=dirl8b_sft", "smollm2_blocks": " experiment=smollm2_convert"}
    names |= {name: f" experiment={name}" for name in ("smollm2_words", "smollm2_mixed")}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name, words in names.items():
            model = build(compose("merge", [f"model={name}", "to=there"]).model)
            with pytest.raises(DirlError, match=f"{model.path} is not there: run `dirl sft{words}` first"):
                model.load("float32", "cpu")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("float16", "cpu", "auto"), "dtype=float16: did you mean bfloat16"),
        (("auto", "gpu", "auto"), "device=gpu: did you mean cuda"),
        (("auto", "cpu", "flash"), "attention=flash: choose one of auto, sdpa, flex, tiles"),
    ],
)
def test_an_unknown_choice_names_the_known_ones(saved, options, sentence):
    with pytest.raises(DirlError, match=sentence):
        SavedModel("mine", str(saved)).load(*options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_told():
    assert pick_device("auto") == "cpu"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(DirlError, match=f"device={device}: there is no CUDA device here, so leave it at auto"):
            pick_device(device)


def test_a_model_without_a_tokenizer_loads_and_says_so_where_one_is_needed(saved):
    lm = load(saved)
    assert lm.tokenizer is None
    with pytest.raises(DirlError, match=f"{saved} has no tokenizer: copy its tokenizer files beside config.json"):
        lm.require_tokenizer()


def test_a_model_has_room_for_whole_blocks_only(copy):
    edit_config(copy, max_position_embeddings=30)
    assert load(copy).longest_prompt == 27


@pytest.mark.parametrize("kind", ["sdar", "sdar_moe", "tiny"])
def test_the_pad_token_learns_as_any_other(kind):
    torch.manual_seed(0)
    ends = {"pad_token_id": PAD, "eos_token_id": PAD}  # the same token, as SmolLM2 has it
    if kind == "sdar":
        lm = diffusion_lm(SDARForCausalLM(SDARConfig(**SIZES, **ends)), None, 4, MASK)
    elif kind == "sdar_moe":
        lm = diffusion_lm(SDARMoeForCausalLM(SDARMoeConfig(**SIZES, **EXPERTS, **ends)), None, 4, MASK)
    else:
        lm = Tiny(hidden_size=32, num_hidden_layers=1).load("float32", "cpu")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    by_autograd, by_differences = slopes(lm, lm.pad_token_id)
    assert by_autograd == pytest.approx(by_differences, rel=0.02)


# Attention


@pytest.mark.parametrize("n", [1, 2])
def test_the_sampler_samples_the_same_whatever_attention_the_model_was_loaded_with(n):
    lm, flex = small_lm(), small_lm(attention="flex_attention")
    assert NativeSampler(flex).sample(PROMPTS, n, OPTIONS) == NativeSampler(lm).sample(PROMPTS, n, OPTIONS)
    assert flex.model.config._attn_implementation == "flex_attention"


def test_a_model_for_inference_has_switches_of_its_own_and_the_same_tensors():
    model = small_lm().model.train()
    second = inference_model(model, "flex_attention")
    assert (model.config._attn_implementation, second.config._attn_implementation) == ("sdpa", "flex_attention")
    assert model.training and not any(module.training for module in second.modules())
    assert all(one is other for one, other in zip(model.parameters(), second.parameters(), strict=True))
    assert {id(module) for module in model.modules()}.isdisjoint(id(module) for module in second.modules())


def test_a_dense_mask_makes_the_model_block_causal(saved):
    lm, ids = load(saved), torch.arange(5, 17)[None]
    position, zeros = torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.long)
    mask = dense_mask(Coordinates(zeros, zeros, position // 4, zeros))
    with torch.no_grad():
        whole = lm.model(ids, position_ids=position, attention_mask=mask).logits
        changed = ids.clone()
        changed[0, 8] = 40
        other = lm.model(changed, position_ids=position, attention_mask=mask).logits
    assert torch.equal(whole[:, :8], other[:, :8])
    assert not torch.allclose(whole[:, 11], other[:, 11])


# From Python


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, dirl_cli; from dirl_cli import Decoding, Trajectory; Decoding(); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import dirl_cli; dirl_cli.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'dirl_cli' has no attribute 'nothing'" in done.stderr


def test_sampling_and_scoring_from_python(saved):
    sampler = load_sampler(saved, device="cpu", dtype="float32")
    decoding = Decoding(
        block_size=None,
        denoising_steps=4,
        strategy="low_confidence_dynamic",
        threshold=0.9,
        confidence="sampled",
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=10,
        stop_token_ids=(),
        seed=0,
    )
    groups = sampler.sample(prompts=PROMPTS, n=2, decoding=decoding)
    assert [len(group) for group in groups] == [2, 2]
    one = groups[0][0]
    assert (one.prompt_ids, one.stop_reason, len(one.token_ids)) == (PROMPTS[0], "length", 13)
    assert len(one.reveal_step) == len(one.logprobs) == 13
    assert 0 < one.denoise_forwards <= one.forwards
    for trajectory, logprobs in zip(groups[1], score(saved, groups[1]), strict=True):
        assert trajectory.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert score(saved, []) == []


@pytest.mark.parametrize("name", ["native", "lmdeploy"])
def test_python_samples_with_the_settings_of_the_configs(saved, name, monkeypatch):
    monkeypatch.setattr(f"dirl_cli.rollout.engines.{name.capitalize()}.require", lambda self: None)
    monkeypatch.setattr(f"dirl_cli.rollout.engines.{name.capitalize()}.start", lambda self, lm: self)
    configured = OmegaConf.load(conf_dir() / f"rollout/{name}.yaml")
    assert load_sampler(saved, device="cpu", rollout=name).max_batch == configured.max_batch
    assert load_sampler(saved, device="cpu", rollout=name, max_batch=7).max_batch == 7
    with pytest.raises(DirlError, match="rollout=nativ: did you mean native"):
        load_sampler(saved, device="cpu", rollout="nativ")


def test_a_sampler_holds_at_least_one_sequence(saved):
    with pytest.raises(DirlError, match=r"rollout\.max_batch=0: give a whole number of at least 1"):
        load_sampler(saved, max_batch=0)
