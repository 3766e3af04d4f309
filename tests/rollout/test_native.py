"""The native sampler against a loop that a reader can check, and what its users count on."""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dirl_cli.diffusion.unmasking import BUILT_IN
from dirl_cli.errors import DirlError
from dirl_cli.rollout.decoder import JoinedDecoder, ModelDecoder
from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import continued
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import HELD, Decoding, Trajectory
from tests.helpers.small import MASK, VOCABULARY, small_lm
from tests.reference.sampling import last_block_logits, sequential_answer

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [11] * 9, [3], []]


def decoding(strategy: str, **options) -> Decoding:
    threshold = 2.0 if strategy == "entropy_bounded" else 0.5
    defaults = {"threshold": threshold, "lowest_threshold": 0.2, "max_new_tokens": 14, "temperature": 1.0}
    return Decoding(strategy=strategy, **defaults | options)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_it_equals_a_loop_without_cache_or_batch(prompt, block_size, by_blocks):
    lm = small_lm(block_size)
    options = decoding("sequential", denoising_steps=block_size)
    [[trajectory]] = NativeSampler(lm, by_blocks=by_blocks).sample([prompt], 1, options)
    assert (trajectory.token_ids, trajectory.reveal_step) == sequential_answer(lm, prompt, options)


def test_left_to_the_model_a_block_takes_a_forward_for_each_of_its_tokens():
    lm = small_lm(8)
    [[one]] = NativeSampler(lm).sample([PROMPTS[1]], 1, decoding("low_confidence_static", max_new_tokens=16))
    assert one.block_size == 8
    assert sorted(one.reveal_step[-8:]) == [*range(1, 9)]
    assert lm.decoding(Decoding()).denoising_steps == 8
    with pytest.raises(DirlError, match="sampled in blocks of 8 and the model's are of 4: set"):
        trajectory_logprobs(small_lm(4), [one])


@pytest.mark.parametrize("confidence", ["sampled", "max", "entropy"])
@pytest.mark.parametrize("strategy", BUILT_IN)
def test_log_probs_at_reveal_equal_the_trainers(strategy, confidence):
    lm = small_lm()
    greedy = {"temperature": 0.0, "top_k": 3}  # what greedy decoding does not look at, scoring must not either
    for shape in ({}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, greedy):
        options = decoding(strategy, confidence=confidence, **shape)
        trajectories = [t for group in NativeSampler(lm).sample(PROMPTS, 2, options) for t in group]
        scored = trajectory_logprobs(lm, trajectories, options)
        for trajectory, logprobs in zip(trajectories, scored, strict=True):
            assert trajectory.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(strategy):
    lm, options = small_lm(), decoding(strategy)
    prompts = [prompt for prompt in PROMPTS if prompt]  # before any token all positions are alike: rounding picks one
    together = NativeSampler(lm, max_batch=3).sample(prompts, 3, options)
    for prompt, group in zip(prompts, together, strict=True):
        assert [t.token_ids for t in NativeSampler(lm).sample([prompt], 3, options)[0]] == [t.token_ids for t in group]


def test_samples_and_seeds_give_different_answers_and_equal_requests_equal_ones():
    lm, options = small_lm(), decoding("sequential")
    sampler = NativeSampler(lm)
    four = sampler.sample([PROMPTS[0]], 4, options)[0]
    repeated = [group[0] for group in sampler.sample([PROMPTS[0]] * 4, 1, options)]
    assert len({tuple(t.token_ids) for t in four}) == 4
    assert repeated[0] == repeated[3] == four[0]
    assert sampler.sample([PROMPTS[0]], 1, replace(options, seed=1))[0][0].token_ids != four[0].token_ids
    seeded = list(sampler.stream([PROMPTS[0]], 1, options, seeds=[1]))
    assert seeded[0][2].token_ids == sampler.sample([PROMPTS[0]], 1, replace(options, seed=1))[0][0].token_ids


def test_missing_samples_can_be_asked_for_alone():
    sampler, options = NativeSampler(small_lm()), decoding("sequential")
    whole = sampler.sample(PROMPTS[:2], 3, options)
    rest = {(p, s): t.token_ids for p, s, t in sampler.stream(PROMPTS[:2], 3, options, first=[1, 3])}
    assert rest == {(0, 1): whole[0][1].token_ids, (0, 2): whole[0][2].token_ids}


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("decoder", [JoinedDecoder, ModelDecoder])
def test_nothing_of_the_model_is_switched_while_its_sampler_decodes(by_blocks, decoder, monkeypatch):
    """Which the model may be learning from in another thread."""
    lm, seen = small_lm(), []
    lm.model.train()
    attention = torch.nn.functional.scaled_dot_product_attention

    def looking(*args, **kwargs):
        seen.append((lm.model.config._attn_implementation, lm.model.training))
        return attention(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", looking)
    monkeypatch.setattr("dirl_cli.rollout.native.decoder_of", decoder)
    NativeSampler(lm, by_blocks=by_blocks).sample([PROMPTS[0]], 1, decoding("sequential"))
    assert seen
    assert set(seen) == {("sdpa", True)}


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_the_mask_token_is_never_sampled_even_where_it_is_likeliest(strategy):
    lm = small_lm()
    with torch.no_grad():
        head = lm.model.get_output_embeddings().weight
        head[MASK] = 30 * head[:MASK].abs().max()
    for trajectory in NativeSampler(lm).sample([[5], [6, 7]], 4, decoding(strategy))[0]:
        assert MASK not in trajectory.token_ids
        assert max(trajectory.token_ids) < VOCABULARY


def test_an_answer_stops_after_the_block_with_a_stop_token_and_the_text_before_it():
    lm = small_lm()
    free = NativeSampler(lm).sample([PROMPTS[0]], 1, decoding("sequential"))[0][0]
    for place in (0, 2, 5):  # in the block shared with the prompt, and later
        stop = free.token_ids[place]
        first = free.token_ids.index(stop)
        stopped = NativeSampler(lm).sample([PROMPTS[0]], 1, decoding("sequential", stop_token_ids=(stop,)))[0][0]
        block_end = (len(PROMPTS[0]) + first) // 4 * 4 + 4 - len(PROMPTS[0])
        assert stopped.stop_reason == "stop"
        assert stopped.token_ids == free.token_ids[:block_end]
        assert stopped.completion_ids == free.token_ids[:first]
    assert free.stop_reason == "length"


def test_an_answer_ends_with_the_models_last_position():
    [[trajectory]] = NativeSampler(small_lm()).sample([[5] * 249], 1, decoding("sequential", max_new_tokens=100))
    assert len(trajectory.token_ids) == 7
    assert trajectory.stop_reason == "length"


def test_forwards_are_one_a_denoising_step_and_none_for_caching():
    for trajectory in NativeSampler(small_lm()).sample([PROMPTS[1]], 2, decoding("sequential", denoising_steps=2))[0]:
        assert len(trajectory.token_ids) == 16
        assert trajectory.denoise_forwards == trajectory.forwards == 4 * 2


def test_every_step_reveals_and_steps_count_from_one():
    for group in NativeSampler(small_lm()).sample(PROMPTS, 2, decoding("low_confidence_dynamic", threshold=0.2)):
        for t in group:
            blocks = defaultdict(set)
            for i, step in enumerate(t.reveal_step, start=len(t.prompt_ids)):
                blocks[i // 4].add(step)
            assert all(steps == set(range(1, max(steps) + 1)) for steps in blocks.values())
            assert t.denoise_forwards == sum(max(steps) for steps in blocks.values())


HINTS = [{}, {1: 30}, {0: 30, 1: 31, 2: 32, 3: 33}, {i: 30 + i for i in range(11)}, {2: 30, 5: 31, 6: 32, 12: 33}]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("logit_shift", [False, True])
def test_held_tokens_stay_where_they_are_and_the_others_are_drawn_beside_them(
    prompt, block_size, by_blocks, logit_shift
):
    if logit_shift and not prompt:
        return  # nothing stands before the first token
    lm = small_lm(block_size)
    lm.model.config.logit_shift = logit_shift
    options = decoding("sequential", denoising_steps=block_size)
    requests = {"seeds": [0] * len(HINTS), "hints": [[hint] for hint in HINTS]}
    sampler = NativeSampler(lm, max_batch=3, by_blocks=by_blocks)  # some wait, some copy the prompt of another
    for i, _, one in sampler.stream([prompt] * len(HINTS), 1, options, **requests):
        hint = HINTS[i]
        assert {k: one.token_ids[k] for k in hint} == hint
        assert [k for k in range(len(one.token_ids)) if one.reveal_step[k] == HELD] == sorted(hint)
        assert [k for k, step in enumerate(one.reveal_step) if step != HELD] == [
            k for k in range(len(one.token_ids)) if k not in hint
        ]
        assert all(one.logprobs[k] == 0 for k in hint)
        assert one.forwards == one.num_revealed  # a token each, and none for a block that is held whole
        if not logit_shift:
            assert (one.token_ids, one.reveal_step) == sequential_answer(lm, prompt, options, hint)
        scored = trajectory_logprobs(lm, [one], options)
        assert one.logprobs == pytest.approx(scored[0], abs=1e-5)


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_every_strategy_reveals_around_a_hint_and_scores_what_it_reveals(strategy):
    lm, options = small_lm(), decoding(strategy, stop_token_ids=(1,))
    hints = [[hint] * 2 for hint in HINTS]
    for i, _, one in NativeSampler(lm).stream([PROMPTS[0]] * len(HINTS), 2, options, hints=hints):
        assert {k: one.token_ids[k] for k in HINTS[i] if k < len(one.token_ids)} == {
            k: token for k, token in HINTS[i].items() if k < len(one.token_ids)
        }
        assert one.logprobs == pytest.approx(trajectory_logprobs(lm, [one], options)[0], abs=1e-5)


def test_an_empty_hint_is_none():
    sampler, options = NativeSampler(small_lm()), decoding("low_confidence_dynamic")
    hinted = list(sampler.stream(PROMPTS[:2], 2, options, hints=[[{}, {}], [{}, {}]]))
    assert hinted == list(sampler.stream(PROMPTS[:2], 2, options))


def test_a_hint_that_leaves_nothing_to_draw_or_ends_the_answer_is_refused():
    sampler, options = NativeSampler(small_lm()), decoding("sequential", stop_token_ids=(1,))
    with pytest.raises(DirlError, match="holds token 14 of an answer of at most 14: leave the last one free"):
        list(sampler.stream([[5]], 1, options, hints=[[{13: 30}]]))
    with pytest.raises(DirlError, match="of an answer of at most 3: leave"):
        list(sampler.stream([[5] * 253], 1, options, hints=[[{2: 30}]]))
    with pytest.raises(DirlError, match="holds a stop token"):
        list(sampler.stream([[5]], 1, options, hints=[[{3: 1}]]))


def test_it_shows_the_blocks_filling():
    seen = []
    sampler = NativeSampler(small_lm())
    [(_, _, trajectory)] = sampler.stream(
        [PROMPTS[0]], 1, decoding("sequential"), watch=lambda prompt, sample, ids: seen.append(ids)
    )
    assert seen[-1] == trajectory.token_ids
    assert [ids.count(MASK) for ids in seen[:3]] == [0, 3, 2]
    assert len(seen) == trajectory.forwards


def test_new_weights_are_used_and_versioned():
    sampler, other = NativeSampler(small_lm(seed=0)), small_lm(seed=1)
    expected = NativeSampler(other).sample([PROMPTS[0]], 1, decoding("sequential"))[0][0]
    sampler.update_weights(other.model.named_parameters(), version=7)
    trajectory = sampler.sample([PROMPTS[0]], 1, decoding("sequential"))[0][0]
    assert trajectory.token_ids == expected.token_ids
    assert trajectory.weights_version == 7


def test_what_cannot_be_sampled_is_told_in_a_sentence():
    sampler = NativeSampler(small_lm())
    with pytest.raises(DirlError, match=r"block_size is 8 and the model's is 4"):
        sampler.sample([[5]], 1, Decoding(block_size=8))
    with pytest.raises(DirlError, match="256 tokens and the model has room for 255"):
        sampler.sample([[5] * 256], 1, Decoding())
    with pytest.raises(DirlError, match="did you mean sampled"):
        Decoding(confidence="sample")


def test_an_engine_that_is_not_there_is_told(monkeypatch):
    from dirl_cli.rollout import engines

    engine = engines.Lmdeploy(max_batch=8, cache_share=0.5)

    def no_version(name):
        raise engines.PackageNotFoundError

    monkeypatch.setattr(engines, "version", no_version)
    with pytest.raises(DirlError, match=r"wants LMDeploy: pip install lmdeploy=="):
        engine.start(small_lm())
    monkeypatch.setattr(engines, "version", lambda name: "0.17.2")
    with pytest.raises(DirlError, match=r"wants LMDeploy 0.18, not 0.17.2"):
        engine.start(small_lm())
    monkeypatch.setattr(engines, "version", lambda name: "0.18.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DirlError, match="wants a CUDA device and there is none"):
        engine.start(small_lm())


def test_an_engine_of_its_own_gets_a_checkpoint_to_start_from(tmp_path):
    from dirl_cli.models.load import SavedModel
    from dirl_cli.rollout.engines import on_disk

    lm = small_lm()
    made = on_disk(lm)
    assert (Path(made) / "config.json").exists()
    assert on_disk(SavedModel("made", made).load("float32", "cpu")) == made


def test_a_sampler_with_weights_of_its_own_keeps_none_while_it_sleeps():
    lm, decoding = small_lm(), Decoding(max_new_tokens=8)
    trained = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    sampler = NativeSampler(lm, own_weights=True)
    before = sampler.sample([[5, 6, 7]], 1, decoding)
    sampler.sleep()
    assert sum(parameter.untyped_storage().nbytes() for parameter in lm.model.parameters()) == 0
    sampler.wake()
    sampler.update_weights(trained.items(), version=0)
    assert sampler.sample([[5, 6, 7]], 1, decoding) == before


@pytest.mark.parametrize("by_blocks", [False, True])
def test_recorded_entropies_are_those_of_the_states_in_which_tokens_were_revealed(by_blocks):
    lm = small_lm()
    options = decoding("low_confidence_dynamic", temperature=0.7, top_k=5)
    [plain] = NativeSampler(lm, by_blocks=by_blocks).sample([PROMPTS[0]], 2, options)
    [answers] = NativeSampler(lm, by_blocks=by_blocks, record_entropy=True).sample([PROMPTS[0]], 2, options)
    assert [replace(one, entropies=[]) for one in answers] == plain
    for one in answers:
        assert one.entropies == pytest.approx(entropies_by_hand(lm, one, 0.7), abs=1e-4)


def entropies_by_hand(lm, answer, temperature) -> list[float]:
    """A forward for each token: all before its block, and of that what earlier steps had revealed."""
    size, first = lm.block_size, len(answer.prompt_ids)
    sequence = [*answer.prompt_ids, *answer.token_ids]
    found = []
    for i, step in enumerate(answer.reveal_step):
        begin = (first + i) // size * size
        state = list(sequence[: begin + size])
        for position in range(max(begin, first), begin + size):
            if answer.reveal_step[position - first] >= step:
                state[position] = MASK
        logits = last_block_logits(lm, state)[first + i - begin] / temperature
        logits[list(lm.unsampled_ids)] = -torch.inf
        probabilities = logits.softmax(-1)
        found.append(-sum(p * math.log(p) for p in probabilities.tolist() if p))
    return found


def test_an_answer_that_goes_on_without_entropies_has_none():
    begun = Trajectory([5], [6, 7], [1, 2], [-1.0, -1.0], entropies=[0.5, 0.1])
    rest = Trajectory([5], [8, 9], [1, 2], [-1.0, -1.0])
    assert continued(begun, rest).entropies == continued(rest, begun).entropies == []
    assert continued(begun, replace(rest, entropies=[0.2, 0.3])).entropies == [0.5, 0.1, 0.2, 0.3]
