"""Dynamic sampling with a sampler and a scorer written by hand: which groups are kept, and which wait."""

import json
from dataclasses import replace
from math import inf

import pytest
import torch

from dirl_cli.errors import DirlError
from dirl_cli.reward.scoring import RewardComputer, RewardSettings
from dirl_cli.rl.advantages import AdvantageEstimator
from dirl_cli.rl.curriculum import Curriculum
from dirl_cli.rl.during_update import prefetch_rollout
from dirl_cli.rl.groups import add_advantages, group_has_signal, ranked_group
from dirl_cli.rl.replay import ReplayedRollouts, Rescorer, continues, rollouts_of
from dirl_cli.rl.rollout_metrics import answer_table, records, rollout_metrics
from dirl_cli.rl.rollout_state import Rollout, RolloutState
from dirl_cli.rollout.storage import Record, rollout_path, write_rollout
from dirl_cli.types import Problem, Trajectory
from tests.helpers.fake_rollouts import MIXED, POOL, SAME, FakeScorer, each, ids, order, source
from tests.helpers.small import small_lm


def test_every_epoch_draws_every_problem_once_in_another_order():
    assert sorted(order(0)) == sorted(order(1)) == [problem.id for problem in POOL]
    assert order(0) != order(1)


def test_problems_are_drawn_until_enough_groups_have_right_and_wrong_answers():
    first, second, third, fourth, *_ = order()
    ours = source({**each(MIXED), first: SAME, third: [1.0, 1.0]})
    rollout = ours.collect(0)
    assert ids(rollout.groups) == [second, fourth]
    assert ids(rollout.sampled) == [first, second, third, fourth]
    assert rollout.num_with_signal == 2
    assert (ours.state.drawn, ours.state.surplus) == (4, [])


def test_draws_end_at_the_cap():
    ours = source(each(SAME), max_rounds=2)
    rollout = ours.collect(0)
    assert (rollout.groups, len(rollout.sampled), ours.state.drawn) == ([], 4, 4)


def test_the_surplus_is_for_the_next_step_also_after_a_checkpoint():
    first, second, third, fourth, *_ = order()
    ours = source({**each(MIXED), first: SAME})
    rollout = ours.collect(0)
    assert ids(rollout.groups) == [second, third]
    assert rollout.num_with_signal == 3
    assert ids(ours.state.surplus) == [fourth]
    restored = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    assert restored == ours.state
    ours.state = restored
    rollout = ours.collect(1)
    assert ids(rollout.groups) == [fourth, order()[4]]
    assert ids(rollout.sampled) == order()[4:]
    assert ids(ours.state.surplus) == [order()[5]]


def test_problems_that_are_always_or_never_solved_are_passed_over_until_they_have_rested():
    solved, hard, *others = order()
    ours = source(
        {**each(MIXED), solved: [1.0, 1.0], hard: SAME}, curriculum=Curriculum(0.1, 0.9, skips=1), max_rounds=1
    )
    asked = []
    for step in range(7):  # of two problems each: two epochs and a third of the six
        asked += ids(ours.collect(step).sampled)
        ours.state = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    assert asked[:6] == order(0)
    assert asked[6:10] == [problem for problem in order(1) if problem in others]
    assert asked[10:14] == order(2)[:4]
    assert ours.epochs()["resting"] == len({solved, hard} & set(order(2)[:4]))


def test_what_is_prefetched_is_what_the_curriculum_asks_next():
    curriculum = Curriculum(0.1, 0.9, skips=1)
    plain, ahead = (source({**each(MIXED), order()[0]: SAME}, curriculum=curriculum, max_rounds=1) for _ in range(2))
    for step in range(6):
        rollout = ahead.collect(step)
        assert ids(rollout.sampled) == ids(plain.collect(step).sampled)
        with prefetch_rollout(ahead, step + 1, 1):
            pass


def test_nothing_is_sampled_while_the_surplus_suffices():
    ours = source(each(MIXED))
    ours.state = RolloutState(surplus=[*ours.collect(0).groups, *ours.collect(0).groups])
    rollout = ours.collect(0)
    assert (len(rollout.groups), rollout.sampled, len(ours.state.surplus), ours.state.drawn) == (2, [], 2, 0)
    assert rollout_metrics(rollout, 2)["groups"] == 2


@pytest.mark.parametrize(
    ("rule", "rewards", "kept"),
    [
        ("accuracy", [1.0, 0.0], True),
        ("accuracy", [0.5, 0.0], False),
        ("reward", [0.5, 0.0], True),
        ("reward", [0.5, 0.5], False),
        ("none", [0.5, 0.5], True),
        ("none", [None, None], False),
        ("reward", [0.5, None], False),
    ],
)
def test_which_groups_each_filter_keeps(rule, rewards, kept):
    rollout = source(each(rewards), filter=rule, max_rounds=1).collect(0)
    assert bool(rollout.groups) is kept


def test_answers_come_in_order_whatever_finishes_first():
    groups = source(each([1.0, 0.0, 0.0]), group_size=3).collect(0).groups
    assert [[record.sample for record in group] for group in groups] == [[0, 1, 2]] * 2
    assert [record.completion for record in groups[0]] == ["0", "1", "2"]
    assert [record.reward for record in groups[0]] == [1.0, 0.0, 0.0]


def test_a_problem_drawn_twice_in_a_step_is_asked_with_two_seeds():
    ours = source(each(MIXED), problems_per_step=12, max_rounds=1)
    ours.collect(0)
    assert len(ours.sampler.asked) == len(set(ours.sampler.asked)) == 12
    again = source(each(MIXED), problems_per_step=12, max_rounds=1)
    again.collect(0)
    assert again.sampler.asked == ours.sampler.asked


def test_answers_left_out_are_counted_and_the_rest_is_learned_from():
    rewards = {**each([1.0, None, 0.0]), order()[0]: [None, None, None]}
    rollout = source(rewards, group_size=3, max_rounds=1).collect(0)
    assert [[record.sample for record in group] for group in rollout.groups] == [[0, 2]]
    metrics = rollout_metrics(rollout, 3)
    assert (metrics["excluded"], metrics["kept"], metrics["reward"], metrics["kept_reward"]) == (4, 0.5, 0.5, 0.5)
    assert answer_table(rollout.sampled, 1).row_count == 2


def test_a_rollout_of_which_nothing_is_left_is_no_error():
    rollout = source(each([None, None]), max_rounds=1).collect(0)
    assert rollout_metrics(rollout, 2) == {"groups": 0, "excluded": 4}
    assert answer_table(rollout.sampled, 1).row_count == 0


def test_metrics_tell_what_was_sampled_and_what_was_kept():
    first, *_ = order()
    metrics = rollout_metrics(source({**each(MIXED), first: SAME}, max_rounds=1).collect(0), 2)
    assert metrics["reward"] == metrics["accuracy"] == metrics["reward/accuracy"] == 0.25
    assert metrics["kept_reward"] == metrics["kept_accuracy"] == metrics["kept"] == 0.5
    assert (metrics["length"], metrics["tokens_per_forward"], metrics["tokens_per_denoising_forward"]) == (1, 1, 2)
    assert "excluded" not in metrics


def test_only_what_a_step_learned_from_is_replayed(tmp_path):
    first, second, third, fourth, *_ = order()
    rollout = source({**each(MIXED), first: SAME}).collect(0)
    groups = add_advantages(rollout.groups, AdvantageEstimator("mean_only", inf, 1.0, {}))
    write_rollout(rollout_path(tmp_path / "rollouts", 1), records(groups, rollout.sampled))
    replayed = ReplayedRollouts(rollouts_of(tmp_path, 1), small_lm(block_size=3)).collect(0)
    assert replayed.groups == groups == replayed.sampled[:2]
    assert ids(replayed.sampled) == [second, third, first, fourth]
    assert replayed.num_with_signal == 2, "of the surplus a file does not say that it passed"
    written = [json.loads(line) for line in (tmp_path / "rollouts/step-000001.jsonl").read_text().splitlines()]
    assert [(line["problem"], line["kept"]) for line in written[::2]] == [
        (second, True),
        (third, True),
        (first, False),
        (fourth, False),  # the surplus: the next step's
    ]


def test_a_problem_that_comes_twice_in_a_row_is_two_groups_when_replayed():
    record = Record(POOL[0], 1, "", Trajectory([1], [9], [1], [0.0], "stop"))
    assert continues(record, replace(record, sample=2))
    assert not continues(record, replace(record, sample=0))
    assert not continues(record, replace(record, sample=2, problem=POOL[1]))


def test_a_replay_longer_than_the_run_is_told_before_it_starts(tmp_path):
    for step in (1, 2):
        write_rollout(rollout_path(tmp_path, step), [])
    assert ReplayedRollouts(rollouts_of(tmp_path, 2), small_lm()).collect(1) == Rollout([], [], 0)
    with pytest.raises(DirlError, match="holds no rollout of step 3: replay fewer with steps=2"):
        rollouts_of(tmp_path, 5)
    with pytest.raises(DirlError, match=r"holds no step-….jsonl"):
        rollouts_of(tmp_path / "elsewhere", 1)


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"reward": None}, "line 2 has no reward: reward it anew with rl.rescore=true"),
        ({"parts": {"own": 1.0}}, r"line 2 has other rewards than the first line \(own and accuracy\)"),
    ],
)
def test_what_is_replayed_as_it_is_was_rewarded_by_one_rule(tmp_path, changed, sentence):
    answer = Trajectory([1, 2], [3, 9], [1, 1], [-0.5, -0.25], "stop", 1, 2, 3, (9,))
    first = Record(POOL[0], 0, "0", answer, reward=1.0, parts={"accuracy": 1.0})
    write_rollout(rollout_path(tmp_path, 1), [first, replace(first, sample=1, **changed)])
    with pytest.raises(DirlError, match=rf"step-000001.jsonl {sentence}"):
        ReplayedRollouts(rollouts_of(tmp_path, 1), small_lm()).collect(0)
    rescorer = Rescorer(FakeScorer(each(MIXED)), "none", longest=8)
    write_rollout(rollout_path(tmp_path, 1), [first, replace(first, sample=1, completion="1", **changed)])
    replayed = ReplayedRollouts(rollouts_of(tmp_path, 1), small_lm(), rescorer).collect(0)
    ((one, other),) = replayed.sampled
    assert replayed.groups == replayed.sampled and replayed.num_with_signal == 1
    assert (one.sample, other.sample, other.reward) == (0, 1, 0.0)


def test_what_the_model_cannot_have_answered_is_not_replayed(tmp_path):
    answer = Trajectory([1, 2], [3, 49], [1, 1], [-0.5, -0.25], "stop", 1, 2, 3, (9,))
    write_rollout(rollout_path(tmp_path, 1), [Record(POOL[0], 0, "3", answer, reward=1.0)])
    with pytest.raises(DirlError, match=r"step-000001.jsonl line 1: token_ids holds 49"):
        ReplayedRollouts(rollouts_of(tmp_path, 1), small_lm()).collect(0)


def test_advantages_are_taken_within_groups():
    groups = source(each([1.0, 0.0, 0.0, 0.0]), group_size=4).collect(0).groups
    found = [record.advantage for record in add_advantages(groups, AdvantageEstimator("normalised", inf, 1.0, {}))[0]]
    assert torch.allclose(torch.tensor(found), torch.tensor([3.0, -1.0, -1.0, -1.0]) / 3**0.5)


def test_a_replay_runs_no_code_that_the_command_line_does_not_name():
    problem = Problem("a", "1+1?", "2", verifier="nowhere.score")
    record = Record(problem, 0, "2", Trajectory([1], [9], [1], [0.0], "stop", denoise_forwards=1))
    with pytest.raises(DirlError, match=r"names the code nowhere.score: .* with data.scorers=\[nowhere.score\]"):
        Rescorer(FakeScorer(each(MIXED)), "none", longest=8).reward([[record]], block_size=4)


RANKED = RewardSettings({"accuracy": 1.0, "speed_rank": 0.2}, workers=1)


def timed(group, forwards):
    """The group, its answers revealed in so many steps of a block."""
    steps = {1: [1, 1], 2: [1, 2]}
    return [
        replace(record, trajectory=replace(record.trajectory, reveal_step=steps[number], block_size=4))
        for record, number in zip(group, forwards, strict=True)
    ]


def test_a_group_that_is_all_right_is_kept_where_its_answers_are_told_apart_by_speed():
    all_right = source(each([1.0, 1.0]), filter="reward", max_rounds=1)
    assert all_right.collect(0).groups == []
    [group, _] = all_right.collect(1).sampled
    slow, fast = ranked_group(timed(group, [2, 1]), RANKED, 2)
    assert (slow.reward, fast.reward, fast.parts) == (1.0, 1.2, {"accuracy": 1.0, "speed_rank": 1.0})
    assert group_has_signal([slow, fast], "reward") and not group_has_signal([slow, fast], "accuracy")
    advantages = AdvantageEstimator("mean_only", inf, 1.0, {})
    values = [record.advantage for record in add_advantages([[slow, fast]], advantages)[0]]
    assert values == pytest.approx([-0.1, 0.1])

    # Equally fast ones are not, nor are wrong ones of any speed.
    assert not group_has_signal(ranked_group(timed(group, [1, 1]), RANKED, 2), "reward")
    wrong = [replace(record, correct=False, parts={"accuracy": 0.0}) for record in timed(group, [1, 2])]
    assert not group_has_signal(ranked_group(wrong, RANKED, 2), "reward")


def test_groups_are_ranked_as_they_are_sampled_and_as_they_are_rewarded_anew():
    ours = source(each([1.0, 1.0, 0.0]), group_size=3, filter="reward", settings=RANKED)
    for group in ours.collect(0).groups:
        assert [record.parts["speed_rank"] for record in group] == [0.5, 0.5, 0.0]
        assert [record.reward for record in group] == [1.1, 1.1, 0.0]

    problem = Problem("a", "1+1?", "2")
    answers = [Trajectory([1], [9] * 3, steps, [0.0] * 3, "stop", 9) for steps in ([1, 2, 3], [1, 1, 2], [1, 1, 1])]
    texts = [r"\boxed{2}", r"\boxed{2}", r"\boxed{3}"]
    records = [Record(problem, k, text, one) for k, (text, one) in enumerate(zip(texts, answers, strict=True))]
    with RewardComputer(RANKED) as reward_computer:
        rescorer = Rescorer(reward_computer, "reward", longest=8)
        [group] = rescorer.reward([records], block_size=4)
    assert [record.reward for record in group] == [1.0, 1.2, 0.0]


def test_hints_make_no_answer_fast():
    """Of four tokens one or three were held: what remains is revealed in fewer forwards whoever answers."""
    group = []
    for sample, steps in enumerate(([1, 2, 3, 4], [1, 2, 2, 3], [0, 1, 2, 3], [0, 0, 0, 1])):
        trajectory = Trajectory([1], [9] * 4, steps, [0.0] * 4, "stop", 9)
        group.append(Record(POOL[0], sample, "", trajectory, 1.0, {"accuracy": 1.0}, True))
    ranks = [record.parts["speed_rank"] for record in ranked_group(group, RANKED, 8)]
    assert ranks == [0.0, 1.0, 0.5, 0.5]
    assert [record.parts["speed_rank"] for record in ranked_group(group[1:], RANKED, 8)] == [0.5] * 3


def test_a_replay_may_be_rewarded_anew():
    trajectory = Trajectory([1], [9], [1], [0.0], "stop", denoise_forwards=1)
    problem = Problem("a", "1+1?", "2")
    right, wrong = (Record(problem, k, rf"\boxed{{{n}}}", trajectory) for k, n in enumerate((2, 3)))
    with RewardComputer(RewardSettings({"binary": 1.0}, workers=1, timeout=30.0)) as reward_computer:
        [[first, second]] = Rescorer(reward_computer, "accuracy", longest=8).reward([[right, wrong]], block_size=4)
    assert (first.reward, first.correct, second.reward, second.correct) == (1.0, True, -1.0, False)
    assert first.trajectory is trajectory
