"""Which answers are paired, and what a text is as an answer."""

from dataclasses import replace

import numpy as np
import pytest

from dirl_cli.dpo.pairs import Pair, Pairing, SampledPairs, pairs_of_run, text_answer
from dirl_cli.errors import DirlError
from dirl_cli.rollout.storage import Record, rollout_path, write_rollout
from dirl_cli.types import HELD, Problem, Trajectory
from tests.helpers.small import small_lm

RIGHT_WRONG = Pairing("right_wrong", limit=4, held_out=0, longest=100, seed=0)
BEST_WORST = Pairing("best_worst", limit=4, held_out=0, longest=100, seed=0)


def record(problem: str, token: int, reward: float | None, correct: bool = False, tokens: int = 4) -> Record:
    """An answer that is one token over and over, to a prompt that is the problem's number."""
    trajectory = Trajectory(
        [int(problem), 5, 6, 7], [token] * tokens, [1] * tokens, [-1.0] * tokens, "stop", 1, 1, block_size=4
    )
    return Record(Problem(problem, "?", "!"), token, "", trajectory, reward, {}, correct)


def tokens(pairs) -> list[tuple[int, int]]:
    return [(pair.chosen.token_ids[0], pair.rejected.token_ids[0]) for pair in pairs]


def written(directory, *steps):
    for step, records in enumerate(steps, start=1):
        write_rollout(rollout_path(directory / "rollouts", step), records)
    return directory


def test_right_answers_are_paired_with_wrong_ones_up_to_the_limit():
    answers = [record("1", token, None, correct=token < 22) for token in range(20, 25)]
    everything = Pairing("right_wrong", 99, 0, 100, 0).pairs_of(answers, 0)
    assert sorted(tokens(everything)) == [(right, wrong) for right in (20, 21) for wrong in (22, 23, 24)]
    some = RIGHT_WRONG.pairs_of(answers, 0)
    assert len(some) == 4 and set(tokens(some)) < set(tokens(everything))
    assert tokens(RIGHT_WRONG.pairs_of(answers, 0)) == tokens(some)
    others = [tokens(Pairing("right_wrong", 4, 0, 100, seed).pairs_of(answers, 0)) for seed in range(5)]
    assert any(one != tokens(some) for one in others)


def test_the_best_answer_is_paired_with_the_worst_as_long_as_rewards_differ():
    answers = [record("1", 20 + i, reward) for i, reward in enumerate([0.5, 1.0, 0.0, 0.5, 0.25])]
    assert tokens(BEST_WORST.pairs_of(answers, 0))[0] == (21, 22)
    assert {chosen for chosen, _ in tokens(BEST_WORST.pairs_of(answers, 0))[1:]} < {20, 23}
    assert len(Pairing("best_worst", 1, 0, 100, 0).pairs_of(answers, 0)) == 1
    assert BEST_WORST.pairs_of([record("1", 20, 0.5), record("1", 21, 0.5)], 0) == []


def test_an_answer_is_not_preferred_to_the_same_tokens():
    same = [record("1", 20, 1.0, correct=True), record("1", 20, 0.0)]
    assert RIGHT_WRONG.pairs_of(same, 0) == BEST_WORST.pairs_of(same, 0) == []


def test_answers_of_all_steps_of_a_run_are_compared(tmp_path):
    run = written(tmp_path, [record("1", 20, 1.0, True), record("2", 21, 0.0)], [record("1", 22, 0.0)])
    pairs = pairs_of_run(run, small_lm(), RIGHT_WRONG)
    assert tokens(pairs.training.pairs) == [(20, 22)] and len(pairs.held_out) == 0
    assert pairs.remarks == [f"1 training and 0 held-out pairs of 1 problem, from 3 answers to 2 in {run}"]


def test_a_group_that_a_later_step_learns_from_counts_once(tmp_path):
    left_over = [record("1", 20, 1.0, True), record("1", 22, 0.0)]
    sampled_anew = replace(left_over[1], trajectory=replace(left_over[1].trajectory, weights_version=1))
    learned_from = [replace(one, advantage=0.5, learned_from=True) for one in left_over]
    run = written(tmp_path, left_over, [*learned_from, record("2", 23, 0.0)])
    pairs = pairs_of_run(run, small_lm(), RIGHT_WRONG)
    assert tokens(pairs.training.pairs) == [(20, 22)] and "from 3 answers to 2 in" in pairs.remarks[0]

    # The same tokens of later weights are another answer.
    run = written(tmp_path / "again", left_over, [sampled_anew])
    assert tokens(pairs_of_run(run, small_lm(), RIGHT_WRONG).training.pairs) == [(20, 22)] * 2


def test_an_answer_that_was_given_a_hint_is_compared_with_none(tmp_path):
    hinted = record("1", 23, 1.0, True)
    hinted = replace(hinted, trajectory=replace(hinted.trajectory, reveal_step=[HELD, 1, 1, 1]))
    run = written(tmp_path, [record("1", 20, 1.0, True), hinted, record("1", 22, 0.0)])
    assert tokens(pairs_of_run(run, small_lm(), RIGHT_WRONG).training.pairs) == [(20, 22)]


@pytest.mark.parametrize("rule", ["right_wrong", "best_worst"])
def test_the_limit_is_of_pairs_that_are_not_too_long(tmp_path, rule):
    too_long = [record("1", token, 2.0, True, tokens=120) for token in range(20, 28)]
    run = written(tmp_path, [*too_long, record("1", 30, 1.0, True), record("1", 31, 0.0)])
    pairs = pairs_of_run(run, small_lm(), Pairing(rule, limit=1, held_out=0, longest=100, seed=0))
    assert tokens(pairs.training.pairs) == [(30, 31)]
    assert pairs.remarks[1] == "8 answers left out that with the prompt hold more than max_tokens=100"


def test_problems_are_held_out_whole(tmp_path):
    records = [record(str(p), 20 + k, None, correct=k < 2) for p in range(8) for k in range(4)]
    run = written(tmp_path, records)
    pairs = pairs_of_run(run, small_lm(), Pairing("right_wrong", 4, 0.25, 100, 0))
    prompts = [{pair.chosen.prompt_ids[0] for pair in part.pairs} for part in (pairs.training, pairs.held_out)]
    assert [len(part) for part in prompts] == [6, 2] and not prompts[0] & prompts[1]
    assert len(pairs.held_out) == 8
    with pytest.raises(DirlError, match=r"has pairs of 8 problems, so 8 cannot be held out: lower dpo.held_out"):
        pairs_of_run(run, small_lm(), Pairing("right_wrong", 4, 8, 100, 0))


@pytest.mark.parametrize(
    ("records", "pairing", "sentence"),
    [
        ([record("1", 20, 1.0, True)], RIGHT_WRONG, r"no problem with both right and wrong answers: .*rl.group_size"),
        ([record("1", 20, 1.0), record("1", 21, 1.0)], BEST_WORST, "no problem with answers of different rewards: "),
        ([record("1", 20, None)], BEST_WORST, "line 1 has no reward to compare: give dpo.pairing=right_wrong"),
        (
            [record("1", 20, 1.0, True, tokens=120), record("1", 21, 0.0, tokens=120)],
            RIGHT_WRONG,
            "every pair of .* has an answer that with the prompt holds more than max_tokens=100: raise it",
        ),
        (
            [record("1", 20, 1.0, True), record("1", 21, 0.0, tokens=120)],
            RIGHT_WRONG,
            "every pair of .* has an answer that with the prompt holds more than max_tokens=100: raise it",
        ),
        (
            [record("1", 20, 1.0, True), record("1", 21, 1.0, True, tokens=120)],
            RIGHT_WRONG,
            "no problem with both right and wrong answers: ",
        ),
        ([record("1", 49, 1.0, True)], RIGHT_WRONG, "token_ids holds 49, which stands for no text"),
    ],
)
def test_a_run_that_makes_no_pair_is_refused(tmp_path, records, pairing, sentence):
    with pytest.raises(DirlError, match=sentence):
        pairs_of_run(written(tmp_path, records), small_lm(), pairing)


def test_a_run_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(
        DirlError, match=r"is not there: sample answers with `dirl rl rl.rollout_only=true out=.*` first"
    ):
        pairs_of_run(tmp_path / "none", small_lm(), RIGHT_WRONG)


def test_a_text_is_answered_by_its_last_trained_stretch_in_whole_blocks():
    token_ids, trained = [5, 6, 7, 8, 9, 10, 1], [False, True, True, False, True, True, True]
    answer = text_answer((token_ids, trained), 4, 0, (1,))
    assert (answer.prompt_ids, answer.token_ids) == ([5, 6, 7, 8], [9, 10, 1, 0])
    assert answer.completion_ids == [9, 10] and answer.reveal_step == [1] * 4


def test_what_a_pair_costs_grows_with_its_denoising_steps():
    quick, slow = ([1] * 8, [1, 2, 3, 4] * 2)
    sampled = []
    for steps in (quick, slow):
        one, other = (Trajectory([5] * 4, [token] * 8, steps) for token in (8, 9))
        sampled.append(SampledPairs([Pair(one, other)], 4))
    assert [int(pairs.costs[0]) for pairs in sampled] == [2 * (12 + 2 * 4), 2 * (12 + 8 * 4)]
    assert np.array_equal(sampled[0].lengths, [12])
    assert sampled[0].digest != sampled[1].digest  # though the tokens are the same
