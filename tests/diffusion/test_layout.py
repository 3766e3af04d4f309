"""The attention rule, and rows laid out and packed by it."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dirl_cli.diffusion.layout import PADDING, SHARED, Coordinates, Strip, attends, first_fit, lay_out, pack
from dirl_cli.models.attention import TILE, attention_mask, block_mask, dense_mask, hidden_states
from tests.helpers.small import small_lm

MASK = 49


def brute_force(strip: list, sequence: list, block: list, view: list) -> list[list[bool]]:
    """The rule of the method, a token pair at a time."""
    n = range(len(strip))
    return [
        [
            strip[q] == strip[k]
            and sequence[k] in (SHARED, sequence[q])
            and ((view[k] == 0 and block[k] < block[q]) or (view[k] == view[q] and block[k] == block[q]))
            for k in n
        ]
        for q in n
    ]


def packed_rows(row_tokens: int = 64):
    torch.manual_seed(0)
    strips = []
    for length in (8, 12, 4):
        masked = torch.rand(2, length) < 0.5
        masked[:, :3] = False
        masked[:, -1] = True
        strips.append(lay_out(torch.randint(5, 45, (length,)), masked, masked, masked.float(), 4, MASK))
    return pack(strips, row_tokens, 4, pad_id=0)


def test_both_backends_equal_the_rule_written_out():
    rows = packed_rows(row_tokens=40)
    dense = dense_mask(rows.coordinates)
    flex = block_mask(rows.coordinates)
    for r in range(len(rows.token_ids)):
        expected = torch.tensor(brute_force(*(c[r].tolist() for c in rows.coordinates)))
        assert torch.equal(dense[r, 0], expected)
        q = torch.arange(expected.shape[0])
        assert torch.equal(flex.mask_mod(torch.tensor(r), 0, q[:, None], q[None, :]), expected)


def flex_mask_of_torch(coordinates: Coordinates) -> BlockMask:
    """What torch makes of the dense mask, padded to whole tiles by tokens that see each other."""
    dense = dense_mask(coordinates)[:, 0]
    more = -dense.shape[1] % TILE
    padded = torch.nn.functional.pad(dense, (0, more, 0, more))
    padding = coordinates.strip == -1
    added = torch.cat([padding, torch.ones(len(padding), more, dtype=torch.bool)], 1)
    padded |= added[:, :, None] & added[:, None, :]
    length = padded.shape[1]
    return create_block_mask(lambda row, head, q, k: padded[row, q, k], len(dense), None, length, length, device="cpu")


@pytest.mark.parametrize("pairs", [1, 2**24])  # a tile of queries at a time, or all at once
def test_a_block_mask_names_the_tiles_that_torch_finds(pairs, monkeypatch):
    monkeypatch.setattr("dirl_cli.models.attention.PAIRS", pairs)
    torch.manual_seed(0)
    masked = [torch.rand(4, length) < 0.5 for length in (180, 96, 500)]
    strips = [lay_out(torch.randint(5, 45, m.shape[1:]), m, m, m.float(), 4, MASK) for m in masked]
    rows = pack(strips, 3000, 4, pad_id=0)
    assert len(rows.token_ids) == 2 and rows.token_ids.shape[1] % TILE
    ours, theirs = block_mask(rows.coordinates), flex_mask_of_torch(rows.coordinates)
    assert ours.seq_lengths == theirs.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):
        names = (f"{kind}_num_blocks", f"{kind}_indices")
        (n, places), (expected_n, expected) = ((getattr(mask, name) for name in names) for mask in (ours, theirs))
        assert torch.equal(n, expected_n)
        assert n.sum() > 0
        used = torch.arange(places.shape[-1]) < n[..., None]
        assert torch.equal(places[used], expected[used])


def test_a_block_mask_is_made_once_for_rows_and_their_copies():
    rows = packed_rows()
    mask = attention_mask(rows, "flex_attention", torch.float32)
    noted = replace(rows, extras={"old_logprobs": rows.weight})
    for same in (rows, noted, rows.to("cpu")):
        assert attention_mask(same, "flex_attention", torch.float32) is mask
    [part] = rows.split(len(rows.token_ids))
    assert attention_mask(part, "flex_attention", torch.float32) is not mask


def test_a_common_prompt_is_seen_by_every_answer_and_answers_do_not_see_each_other():
    prompt, first, second = SHARED, 1, 2
    c = Coordinates(torch.zeros(3), torch.tensor([prompt, first, second]), torch.tensor([0, 1, 1]), torch.zeros(3))
    seen = attends(Coordinates(*(x[:, None] for x in c)), Coordinates(*(x[None] for x in c)))
    assert seen.tolist() == [[True, False, False], [True, True, False], [True, False, True]]


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [(1, torch.ones(6, 6).tril().bool()), (6, torch.ones(6, 6).bool())],
)
def test_blocks_of_one_are_causal_and_one_block_is_bidirectional(block_size, expected):
    zeros = torch.zeros(1, 6, dtype=torch.long)
    rule = dense_mask(Coordinates(zeros, zeros, torch.arange(6)[None] // block_size, zeros))
    assert torch.equal(rule[0, 0], expected)


def test_only_blocks_that_teach_or_are_read_cost_a_forward():
    masked = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    strip = lay_out(torch.arange(10, 22), masked, masked, torch.ones(1, 12), 4, MASK)
    assert strip.token_ids.tolist() == [10, 11, 12, 13, 14, MASK, MASK, 17]  # clean block 0, noised block 1
    assert strip.view.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert strip.target_index.tolist() == [5, 6]
    assert strip.targets.tolist() == [15, 16]


def test_no_noised_token_sees_the_clean_copy_of_its_own_or_a_later_block():
    small = small_lm()
    model = small.model
    token_ids = torch.arange(20, 36)
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, [5, 6, 14]] = True
    rows = pack([lay_out(token_ids, masked, masked, masked.float(), 4, small.mask_token_id)], 64, 4, 0)
    embedded = model.get_input_embeddings()(rows.token_ids).detach().requires_grad_()
    output = model.get_decoder()(
        inputs_embeds=embedded, position_ids=rows.position, attention_mask=dense_mask(rows.coordinates)
    ).last_hidden_state
    block, view = rows.position[0] // 4, rows.view[0]
    for noised_block in (1, 3):
        inside = (view == 1) & (block == noised_block)
        (gradient,) = torch.autograd.grad(output[0, inside].pow(2).sum(), embedded, retain_graph=True)
        reaches = gradient[0].abs().sum(-1) > 0
        assert not reaches[(view == 0) & (block >= noised_block)].any()
        assert not reaches[(view == 1) & (block != noised_block)].any()
        assert reaches[(view == 0) & (block < noised_block)].all()


def test_packing_changes_nothing():
    apart, together = packed_rows(row_tokens=1), packed_rows(row_tokens=1000)
    assert len(apart.token_ids) == 3
    assert len(together.token_ids) == 1
    small = small_lm()
    scored = []
    for rows in (apart, together):
        with torch.no_grad():
            hidden = hidden_states(small.model, rows).flatten(0, 1)[rows.target_index]
        order = sorted(range(len(rows.target_index)), key=lambda i: key(rows, i))
        scored.append(hidden[order])
    torch.testing.assert_close(scored[0], scored[1], atol=2e-5, rtol=0)


def key(rows, i: int) -> tuple[int, int, int]:
    return tuple(int(rows.at_targets(c)[i]) for c in (rows.strip, rows.view, rows.position))


def test_splitting_rows_keeps_every_scored_token():
    rows = packed_rows(row_tokens=1)
    parts = rows.split(2)
    assert [len(part.token_ids) for part in parts] == [2, 1]
    assert sorted(key(part, i) for part in parts for i in range(len(part.target_index))) == sorted(
        key(rows, i) for i in range(len(rows.target_index))
    )
    for part in parts:
        assert (part.token_ids.flatten()[part.target_index] == MASK).all()
        assert part.token_ids.shape[1] == int((part.strip != PADDING).sum(1).max())


def test_padding_is_counted_apart():
    rows = packed_rows(row_tokens=1)
    assert rows.num_tokens == sum(int((row != PADDING).sum()) for row in rows.strip)
    assert rows.num_tokens < rows.token_ids.numel()


def test_rows_are_filled_longest_first():
    assert first_fit([3, 6, 4, 9], 10) == [[3], [1, 2], [0]]


def first_fit_that_asks_every_bin(lengths, capacity):
    bins, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, room in enumerate(free) if room >= lengths[i]]
        if not fitting:
            fitting = [len(bins)]
            bins.append([])
            free.append(capacity)
        bins[fitting[0]].append(i)
        free[fitting[0]] -= lengths[i]
    return bins


def test_bins_that_are_too_full_for_the_shortest_are_not_missed():
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        lengths = torch.randint(1, 80, (number % 40,), generator=generator).tolist()
        for capacity in (1, 20, 60, 200):
            assert first_fit(lengths, capacity) == first_fit_that_asks_every_bin(lengths, capacity)


def test_a_strip_longer_than_a_row_gets_one_of_its_own():
    one = torch.zeros(5, dtype=torch.long)
    strip = Strip(one, one, one, one, one[:0], one[:0], one[:0], torch.zeros(0))
    assert pack([strip, strip], 3, 4, 0).token_ids.shape == (2, 5)
