"""The published layout: names, shapes, shards and configurations of the released models, on random weights."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM, SavedModel, diffusion_lm
from dirl_cli.models.save import save_published
from dirl_cli.models.sdar import SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from tests.helpers.small import EXPERTS, MASK, SIZES, random_lm, small_lm

IDS = torch.arange(5, 13)[None]


def load(path: Path, dtype: str = "float32") -> DiffusionLM:
    return SavedModel("mine", str(path)).load(dtype, "cpu")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stored(directory: Path) -> dict[str, str]:
    """The file that each tensor is in."""
    names = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), file.name)
    return names


# What is saved and comes back


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_weights_come_back_to_the_last_bit_from_one_file_and_from_several(tmp_path, kind, dtype, shard):
    lm = random_lm(kind)
    lm.model.to(getattr(torch, dtype))
    save_published(tmp_path / "model", lm.model, None, max_shard_size=shard)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert type(back) is type(lm.model)
    before, after = lm.model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    files = stored(tmp_path / "model")
    assert ("lm_head.weight" in files) == (kind != "tied")
    index = tmp_path / "model/model.safetensors.index.json"
    assert index.exists() == (len(set(files.values())) > 1) == (shard == "20KB")
    if index.exists():
        written = json.loads(index.read_text())
        assert written["weight_map"] == files
        width = before["model.norm.weight"].element_size()
        assert written["metadata"]["total_size"] == width * sum(p.numel() for p in lm.model.parameters())


def test_everyone_may_read_a_saved_model_who_may_read_its_configuration(tmp_path):
    small_lm().save(tmp_path / "model")
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1


# Names and shapes of the released models


def dense_shapes(hidden: int, layers: int, heads: int, groups: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published dense SDAR of 128-wide heads."""
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * 128, hidden),
        "self_attn.k_proj": (groups * 128, hidden),
        "self_attn.v_proj": (groups * 128, hidden),
        "self_attn.o_proj": (hidden, heads * 128),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    ends = {
        "model.embed_tokens.weight": (151936, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (151936, hidden),
    }
    return ends | {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("SDAR-8B-Chat", dense_shapes(4096, 36, 32, 8, 12288)),
        ("SDAR-4B-Chat", dense_shapes(2560, 36, 32, 8, 9728)),
    ],
)
def test_a_published_configuration_gives_all_399_tensors_with_their_shapes(shared, name, shapes):
    config = AutoConfig.from_pretrained(shared / f"models/configs/{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert type(model) is SDARForCausalLM
    assert len(shapes) == 36 * 11 + 3 == 399
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


def published_tensors(experts: int) -> dict[str, np.ndarray]:
    """Small random weights under the names of published files; a dense model where there are no experts."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (50, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (50, 32),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (32,), f"{layer}.post_attention_layernorm.weight": (32,)}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (8,) for name in "qk"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (16, 32) for name in "kv"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (32, 32) for name in "qo"}
        if experts:
            shapes[f"{layer}.mlp.gate.weight"] = (experts, 32)
        width = 16 if experts else 64
        for mlp in [f"{layer}.mlp.experts.{e}" for e in range(experts)] or [f"{layer}.mlp"]:
            shapes |= {f"{mlp}.{name}_proj.weight": (width, 32) for name in ("gate", "up")}
            shapes[f"{mlp}.down_proj.weight"] = (32, width)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_published(directory: Path, tensors: dict[str, np.ndarray], shards: int, **config: object) -> Path:
    """A checkpoint as the Hub holds it, written without torch; its tensors are dealt out to the shards in turn."""
    directory.mkdir()
    settings = {**SIZES, "bos_token_id": 1, "eos_token_id": 1, "rope_theta": 1000000, "rope_scaling": None, **config}
    (directory / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float32"}))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("experts", [0, 4])
def test_a_published_file_is_used_to_the_last_key_however_it_is_cut(tmp_path, experts):
    tensors = published_tensors(experts)
    kind = {"model_type": "sdar_moe", **EXPERTS} if experts else {"model_type": "sdar"}
    settings = {**kind, "block_size": 4, "mask_token_id": MASK}
    cut = [load(write_published(tmp_path / str(n), tensors, n, **settings)) for n in (1, 3, 7)]
    plain = {**settings, "model_type": "qwen3_moe" if experts else "qwen3"}
    qwen = Qwen3MoeForCausalLM if experts else Qwen3ForCausalLM
    reference = qwen.from_pretrained(write_published(tmp_path / "qwen", tensors, 1, **plain), dtype=torch.float32)
    for lm in cut:
        assert torch.equal(logits(lm.model), logits(reference))
    cut[1].save(tmp_path / "saved")
    written = load_file(tmp_path / "saved/model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name].numpy(), tensors[name]) for name in tensors)


def test_a_mixture_keeps_the_names_of_its_configuration(tmp_path):
    random_lm("moe").save(tmp_path / "moe")
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("sdar_moe", ["SDARMoeForCausalLM"])
    assert {name: config[name] for name in EXPERTS} == EXPERTS
    assert "num_local_experts" not in config


def test_the_mixture_of_30b_has_each_expert_by_itself(tmp_path):
    narrow = {**SIZES, "hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
    config = SDARMoeConfig(**{**narrow, **EXPERTS, "num_experts": 128, "moe_intermediate_size": 2})
    lm = diffusion_lm(SDARMoeForCausalLM(config), None, 4, MASK)
    lm.save(tmp_path / "moe")
    parts = Counter(name.rpartition("layers.1.")[2] for name in stored(tmp_path / "moe") if "layers.1." in name)
    experts = [f"mlp.experts.{e}.{part}_proj.weight" for e in range(128) for part in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    others = ["mlp.gate", *norms, *(f"self_attn.{part}_proj" for part in "qkvo")]
    assert parts == Counter([*experts, *(f"{name}.weight" for name in others)])


# Configurations


CHANGED = {
    "auto_map": "the code it names is not there and is never run",
    "attn_implementation": "chosen when a model is loaded",
    "rope_scaling": "part of rope_parameters; null",
    "rope_parameters": "what transformers 5 reads",
    "layer_types": "what transformers 5 reads",
    "pad_token_id": "null, as where it is absent",
    "transformers_version": "that which saved it",
}


@pytest.mark.parametrize("name", ["SDAR-4B-Chat", "SDAR-8B-Chat"])
def test_a_saved_configuration_says_what_the_published_one_says(shared, tmp_path, name):
    published = json.loads((shared / f"models/configs/{name}.json").read_text())
    published |= {key: SIZES[key] for key in SIZES if key not in ("vocab_size", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = SDARForCausalLM(AutoConfig.from_pretrained(tmp_path)).to(torch.bfloat16)
    diffusion_lm(model, None, 4, 151669).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    absent = object()
    differing = {key for key in saved | published if saved.get(key, absent) != published.get(key, absent)}
    assert differing == CHANGED.keys()
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000}


def test_the_generation_configuration_says_how_an_answer_ends_and_what_is_masked(tmp_path):
    lm = random_lm("untied")
    lm.save(tmp_path / "model")
    said = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert said["eos_token_id"] == list(lm.stop_token_ids) and said["pad_token_id"] == lm.pad_token_id
    assert (said["block_size"], said["mask_token_id"]) == (4, MASK)
    back = load(tmp_path / "model")
    assert (back.stop_token_ids, back.pad_token_id) == (lm.stop_token_ids, lm.pad_token_id)


# What does not fit together


@pytest.fixture
def mixture(tmp_path) -> Path:
    tensors = published_tensors(4)
    settings = {"model_type": "sdar_moe", **EXPERTS, "block_size": 4, "mask_token_id": MASK}
    return write_published(tmp_path / "mixture", tensors, 3, **settings)


def test_an_expert_that_is_missing_is_told_in_one_sentence(mixture):
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    file = mixture / stored(mixture)[name]
    tensors = {key: value.numpy() for key, value in load_file(file).items() if key != name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DirlError, match="the experts of a layer are incomplete or differ in shape"):
        load(mixture)


def test_fewer_experts_than_the_file_holds_are_told_in_one_sentence(mixture):
    config = json.loads((mixture / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps(config | {"num_experts": 3}))
    with pytest.raises(DirlError, match=r"with shape \(4, .*and its config.json asks for \(3, "):
        load(mixture)
