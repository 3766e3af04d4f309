"""Attention by tiles on a CPU: the dense mask's numbers, for rows of every kind."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dirl_cli.diffusion.layout import PADDING, Rows, Strip, join_strips, lay_out, pack, without_first
from dirl_cli.diffusion.states import AnswerMasked, BlockMasks, BlockSpec, LeftToRight, RandomMasks, Trace
from dirl_cli.errors import DirlError
from dirl_cli.models import attention, attention_cpu
from dirl_cli.models.attention import attention_inputs, dense_mask, hidden_states
from dirl_cli.models.attention_cpu import TILES, as_dense_mask, attention_tiles
from dirl_cli.models.load import DiffusionLM, diffusion_lm, pick_attention
from dirl_cli.models.peft import LoraFinetune, trainable_parameters
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.rl.critic import ValueModel
from dirl_cli.training.layers import checkpoint_layers, compile_layers
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.types import HELD, Trajectory
from tests.helpers.answers import widened
from tests.helpers.small import MASK, PAD, SIZES, random_lm, small_lm

VIEWS = (Trace(), LeftToRight(2), RandomMasks(0.2, 0.9, 2), BlockMasks(2), AnswerMasked(0.3))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 queries for rows of any width, so that small rows have many."""
    monkeypatch.setattr(attention, "DENSE_TOKENS", 0)
    monkeypatch.setattr(attention_cpu, "QUERIES", 16)
    monkeypatch.setattr(attention_cpu, "FEW", 4)
    monkeypatch.setattr(attention_cpu, "CALL", 64)


def random_strip(block_size: int, views: int, blocks: int, answers: int, seed: int) -> Strip:
    """Answers to a prompt that ends anywhere, some of their tokens held; views: which of `VIEWS`, or demonstrations."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most + 1, (1,), generator=generator))

    prompt = torch.randint(5, 45, (number(3 * block_size),), generator=generator).tolist()
    strips = []
    for _ in range(answers):
        length = (len(prompt) // block_size + 1 + number(blocks)) * block_size - len(prompt)
        token_ids = torch.randint(5, 45, (length,), generator=generator).tolist()
        reveal_step = torch.randint(1, block_size + 1, (length,), generator=generator).tolist()
        for i in range(length - 1):
            if number(7) == 0:
                reveal_step[i] = HELD
        if views == len(VIEWS):
            masked = torch.rand(1, len(prompt) + length, generator=generator) < 0.5
            masked[0, : len(prompt)] = False
            masked[0, -1] = True
            ids = torch.tensor([*prompt, *token_ids])
            strips.append(lay_out(ids, masked, masked, masked.float(), block_size, MASK))
        else:
            answer = Trajectory(prompt, token_ids, reveal_step, [-1.0] * length, "length")
            strips.append(VIEWS[views](answer, BlockSpec(block_size, MASK), generator))
    if answers == 1:
        return strips[0]
    joined = join_strips(strips, block_size)
    filler = min(number(block_size), int(joined.position[joined.target_index].min()))
    return without_first(joined, filler)


packed = some.builds(
    lambda block_size, drawn, row_tokens, padding: widened(
        pack([random_strip(block_size, *of_strip) for of_strip in drawn], row_tokens, block_size, PAD), padding
    ),
    some.sampled_from([1, 2, 3, 4, 6]),
    some.lists(
        some.tuples(some.integers(0, len(VIEWS)), some.integers(0, 4), some.integers(1, 3), some.integers(0, 2**30)),
        min_size=1,
        max_size=3,
    ),
    some.sampled_from([1, 60, 300, 1000]),
    some.sampled_from([0, 0, 5]),
)


def gradients(scorer: nn.Module, rows: Rows) -> Tensor:
    """Of a loss that weighs each score differently, by all parameters that learn."""
    scorer.zero_grad()
    scores = scorer(rows)[0]
    (scores * torch.linspace(-1, 2, len(scores))).sum().backward()
    return torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


def with_tiles(model: nn.Module) -> nn.Module:
    """A copy of it that attends by tiles."""
    tiled = copy.deepcopy(model)
    for module in tiled.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = TILES
    return tiled


def require_equal(model: nn.Module, rows: Rows, tolerance: float = 1e-6) -> None:
    """Scores and gradients under tiles and under a dense mask differ by so little of their length."""
    tiled = with_tiles(model)
    with torch.no_grad():
        expected, found = (scorer(rows)[0] for scorer in (model, tiled))
    assert (found - expected).norm() <= tolerance * expected.norm()
    expected, found = (gradients(scorer, rows) for scorer in (model, tiled))
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


def some_rows(block_size: int = 4, seed: int = 0) -> Rows:
    """Two rows of demonstrations, and of groups whose answers share their prompts."""
    kinds = ((5, 12, 1), (0, 6, 3), (5, 3, 1), (3, 4, 2))
    strips = [random_strip(block_size, *kind, seed=seed + i) for i, kind in enumerate(kinds)]
    return pack(strips, 400, block_size, PAD)


# The rule


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(packed, some.sampled_from([4, 16, 64]))
def test_tiles_let_through_what_the_rule_does(rows, queries):
    attention_cpu.QUERIES = queries
    tiles = attention_tiles(rows.coordinates, torch.float32)
    found = as_dense_mask(tiles, *rows.token_ids.shape)[:, 0] == 0
    computed = rows.strip != PADDING
    assert torch.equal(found[computed], dense_mask(rows.coordinates)[:, 0][computed])

    in_tiles = torch.zeros_like(rows.strip)
    for tile in tiles:
        in_tiles[tile.row, tile.queries] += 1
    assert torch.equal(in_tiles, computed.long())  # each query in one tile


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(packed)
def test_scores_and_gradients_are_those_of_the_dense_mask(rows):
    lm = small_lm(rows.block_size, scale=1.0)
    require_equal(LogprobModel(lm.model, lm.unsampled_ids), rows)


@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_so_they_are_in_fp32_for_every_kind_of_model(kind):
    lm = random_lm(kind)
    require_equal(LogprobModel(lm.model, lm.unsampled_ids), some_rows())


@pytest.mark.parametrize("block_size", [1, 2, 8, 16])
def test_so_they_are_as_blocks_grow(block_size):
    lm = small_lm(block_size, scale=1.0)
    require_equal(LogprobModel(lm.model, lm.unsampled_ids), some_rows(block_size))


def biased_lm(key_heads: int) -> DiffusionLM:
    config = SDARConfig(**SIZES | {"num_key_value_heads": key_heads}, attention_bias=True, pad_token_id=None)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = SDARForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return diffusion_lm(model, None, 4, MASK)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_so_they_are_with_biases_and_as_many_heads_of_keys_as_there_may_be(key_heads):
    lm = biased_lm(key_heads)
    require_equal(LogprobModel(lm.model, lm.unsampled_ids), some_rows())


def test_so_they_are_with_an_adapter():
    lm = random_lm("untied")
    LoraFinetune(("q_proj", "v_proj", "down_proj"), 4, 8, 0.0, False, 0).adapt(lm.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in trainable_parameters(lm.model).values():
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
    require_equal(LogprobModel(lm.model, lm.unsampled_ids), some_rows())


@pytest.mark.parametrize("checkpointing", [True, "attention"])
def test_so_they_are_with_gradient_checkpointing(checkpointing):
    lm = random_lm("untied")
    checkpoint_layers(lm.model, checkpointing)
    lm.model.train()
    require_equal(LogprobModel(lm.model, lm.unsampled_ids), some_rows())


def test_so_are_a_critics_values():
    critic = ValueModel(random_lm("untied").model.get_decoder(), is_own=True)
    with torch.no_grad():
        critic.weight.copy_(torch.linspace(-1, 1, len(critic.weight)))
    require_equal(critic, some_rows())


def test_in_bf16_both_are_as_far_from_the_exact_gradient():
    lm, rows = small_lm(scale=2.0), some_rows()
    dense = LogprobModel(lm.model, lm.unsampled_ids)
    exact = gradients(dense, rows)
    distances = []
    for scorer in (dense, with_tiles(dense)):
        with torch.autocast("cpu", torch.bfloat16):
            distances.append((gradients(scorer, rows) - exact).norm() / exact.norm())
    assert 1e-4 < distances[1] < 1.2 * distances[0] < 0.1


# Models of transformers

CONFIGS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "phi": {},
    "olmo": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


def causal_model(kind: str, **options: float) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind,
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        **({} if kind == "opt" else {"intermediate_size": 64}),
        **CONFIGS[kind],
        **options,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_model_hands_tiles_to_its_layers(kind):
    require_equal(LogprobModel(causal_model(kind)), some_rows())


def test_a_model_that_drops_weights_of_its_attention_goes_on_dropping_them():
    model, rows = causal_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).train(), some_rows()
    found = []
    for one in (model, with_tiles(model), model):
        torch.manual_seed(len(found) // 2)
        found.append(hidden_states(one, rows)[rows.strip != PADDING])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)
    assert (found[2] - found[0]).abs().max() > 0.01


def test_whoever_gives_a_model_no_tiles_meets_sdpa():
    lm = small_lm()
    tiled = with_tiles(lm.model)
    token_ids = torch.arange(5, 29).view(2, 12)
    not_padding = torch.ones(2, 12, dtype=torch.long)
    not_padding[1, :5] = 0
    for mask in (None, not_padding):
        expected, found = (model(token_ids, attention_mask=mask).logits for model in (lm.model, tiled))
        assert torch.equal(found, expected)


# Where tiles are taken, and what they cost


def test_short_rows_have_a_dense_mask_to_the_bit(monkeypatch):
    lm, rows = small_lm(), some_rows()
    tiled = with_tiles(lm.model)
    width = rows.token_ids.shape[1]
    is_equal = []
    for most in (width, width - 1):
        monkeypatch.setattr(attention, "DENSE_TOKENS", most)
        is_equal.append(torch.equal(hidden_states(tiled, rows), hidden_states(lm.model, rows)))
    assert is_equal == [True, False]


def test_compiled_layers_have_a_dense_mask():
    lm, rows = small_lm(), some_rows()
    compiled = with_tiles(lm.model)
    compile_layers(compiled, "eager")
    torch.testing.assert_close(hidden_states(compiled, rows), hidden_states(lm.model, rows), atol=1e-6, rtol=1e-6)
    assert "tiles" in attention_inputs(rows, TILES, torch.float32, is_compiled=False)
    assert "tiles" not in attention_inputs(rows, TILES, torch.float32, is_compiled=True)


def test_auto_is_tiles_on_a_cpu_and_a_gpu_has_none():
    assert (pick_attention("auto", "cpu"), pick_attention("auto", "cuda:0")) == (TILES, "flex_attention")
    assert pick_attention("sdpa", "cpu") == "sdpa"
    with pytest.raises(DirlError, match="attention=tiles is for a CPU: leave it at auto"):
        pick_attention("tiles", "cuda")


def test_padding_is_not_computed_and_changes_nothing():
    lm, rows = small_lm(), some_rows()
    tiled = with_tiles(lm.model)
    wide = widened(rows, 50)
    found, expected = hidden_states(tiled, wide), hidden_states(tiled, rows)
    assert found.isfinite().all()
    assert torch.equal(found[:, : rows.token_ids.shape[1]], expected)


@pytest.mark.parametrize(("answers", "blocks", "most"), [(1, 400, 1.25), (4, 100, 1.7), (20, 8, 5.0)])
def test_next_to_nothing_is_computed_that_the_rule_forbids(answers, blocks, most, monkeypatch):
    monkeypatch.undo()  # tiles of 128
    masked = torch.zeros(1, 4 * blocks, dtype=torch.bool)
    masked[:, 16:] = True
    strip = lay_out(torch.arange(4 * blocks), masked, masked, masked.float(), 4, MASK)
    rows = pack([strip] * answers, 4000, 4, PAD)
    pairs = 0
    for tile in attention_tiles(rows.coordinates, torch.float32):
        keys = len(tile.mixed) + sum(keys.stop - keys.start for keys in tile.seen_by_all)
        pairs += (tile.queries.stop - tile.queries.start) * keys
    allowed = int(dense_mask(rows.coordinates)[rows.strip[:, None] != PADDING].sum())
    assert allowed < pairs <= most * allowed


def test_rows_of_one_kind_take_the_same_tiles_every_time():
    rows = some_rows()
    one, other = (attention_tiles(replace(rows).coordinates, torch.float32) for _ in range(2))
    assert [tile.queries for tile in one] == [tile.queries for tile in other]
