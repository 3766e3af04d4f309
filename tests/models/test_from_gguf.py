"""A checkpoint out of an installed package's GGUF file: the same model and tokenizer, loaded like any other."""

import shlex

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.errors import DirlError
from dirl_cli.models.from_causal import FromCausal, convert_gguf
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.types import Decoding

HEADS, KEY_HEADS, TEMPLATE = 4, 2, "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
WORDS = ["<s>", "</s>", "<pad>", *map(chr, range(33, 127)), "ab", "cd"]
OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OF_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


@pytest.fixture
def causal() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape, **heads)).eval()


@pytest.fixture
def package(causal, tmp_path, monkeypatch) -> str:
    """An installed package that brings the model along, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install -e '.[smol]'")
    (tmp_path / "site/tiny_gguf").mkdir(parents=True)
    about = tmp_path / "site/tiny_gguf-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
    (about / "RECORD").write_text("tiny_gguf/model.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config, writer = causal.config, gguf.GGUFWriter(tmp_path / "site/tiny_gguf/model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in causal.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(named(name), interleaved(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "tiny-gguf"


def named(name: str) -> str:
    """What llama.cpp calls a parameter of transformers."""
    part = name.removesuffix(".weight")
    if part in OF_MODEL:
        return f"{OF_MODEL[part]}.weight"
    _, _, layer, inner = part.split(".", 3)
    return f"blk.{layer}.{OF_LAYER[inner]}.weight"


def interleaved(name: str, tensor: np.ndarray) -> np.ndarray:
    """Queries and keys with the halves that rotate together side by side."""
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def test_the_model_in_the_package_becomes_a_checkpoint_with_the_same_logits(causal, package, tmp_path):
    convert_gguf(package, "tiny_gguf/model.gguf", tmp_path / "model")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    token_ids = torch.randint(0, len(WORDS), (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(found(token_ids).logits, causal(token_ids).logits, atol=1e-5, rtol=0)
    assert (found.config.bos_token_id, found.config.eos_token_id, found.config.pad_token_id) == (0, 1, 2)


def test_what_was_unpacked_is_made_blocks_of(package, tmp_path):
    convert_gguf(package, "tiny_gguf/model.gguf", tmp_path / "model")
    lm = FromCausal("tiny", str(tmp_path / "model"), 4, True).load("float32", "cpu", "sdpa")
    tokenizer = lm.require_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template == TEMPLATE
    assert lm.mask_token_id == len(WORDS) and lm.stop_token_ids == (1,)
    ((answer,),) = NativeSampler(lm).sample([[5, 6, 7]], 1, Decoding(max_new_tokens=8))
    assert len(answer.token_ids) >= 1


def test_what_to_do_next_with_an_unpacked_model_is_a_command_that_works(package, here):
    of_package = [f"model.package={package}", "model.file=tiny_gguf/model.gguf"]
    runner = CliRunner(env={"HYDRA_FULL_ERROR": "0"})  # which a command sets, put back after it
    printed = runner.invoke(app, ["download", "model=smollm2", *of_package, "--to", "here"]).stdout
    proposed = printed.splitlines()[-1].removeprefix("Next: dirl ")
    words = [*shlex.split(proposed), "device=cpu", "decoding.max_new_tokens=4"]
    assert words[:3] == ["generate", "model=smollm2", "model.path=here"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("words", "said"), [(["dry_run=true"], "is to be in here"), ([], "is in here")])
def test_a_dry_run_says_where_the_model_of_a_package_is_to_be(package, here, words, said):
    of_package = [f"model.package={package}", "model.file=tiny_gguf/model.gguf", "--to", "here"]
    printed = CliRunner(env={"HYDRA_FULL_ERROR": "0"}).invoke(app, ["download", "model=smollm2", *of_package, *words])
    assert printed.stdout.startswith(f"smollm2 {said}\n")
    assert (here / "here/config.json").exists() == (not words)


def test_a_package_that_is_not_there_is_told_with_its_remedy(tmp_path):
    with pytest.raises(DirlError, match="comes in the package nowhere-to-be-found, which is not installed: pip"):
        convert_gguf("nowhere-to-be-found", "model.gguf", tmp_path)
