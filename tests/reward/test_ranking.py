"""What an answer is worth by its place among the others to its problem."""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from random import Random

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.reward.ranking import Contender, speed_rank
from dirl_cli.reward.scoring import RewardSettings

FAST, SLOW = Contender(True, 40, 10), Contender(True, 40, 20)
WRONG = Contender(False, 40, 1)


def duels(answers, measure):
    """Of each right answer the mean of its duels with the other right ones: 1 for a win, a half for a draw."""

    def speed(answer):
        return Fraction(-answer.forwards) if measure == "forwards" else Fraction(answer.tokens, answer.forwards)

    values = []
    for i, one in enumerate(answers):
        won = []
        for k, other in enumerate(answers):
            if i != k and one.correct and other.correct:
                won.append(1.0 if speed(one) > speed(other) else 0.5 * (speed(one) == speed(other)))
        values.append(sum(won) / len(won) if won else 0.5 * one.correct)
    return values


def test_right_answers_are_in_order_of_speed_and_wrong_ones_in_none():
    assert speed_rank([SLOW, FAST, WRONG]) == [0.0, 1.0, 0.0]
    assert speed_rank([SLOW, FAST, Contender(True, 40, 15)]) == [0.0, 1.0, 0.5]
    assert speed_rank([FAST, FAST, FAST]) == [0.5] * 3
    assert speed_rank([WRONG, FAST]) == [0.0, 0.5]
    assert speed_rank([WRONG, WRONG]) == [0.0, 0.0]


def test_speed_is_tokens_a_forward_or_forwards_alone():
    short = Contender(True, 10, 8)  # 1.25 tokens a forward, and FAST has 4
    assert speed_rank([short, FAST]) == [0.0, 1.0]
    assert speed_rank([short, FAST], measure="forwards") == [1.0, 0.0]


@pytest.mark.parametrize("measure", ["tokens_per_forward", "forwards"])
def test_a_rank_is_the_mean_of_duels(measure):
    rng = Random(0)
    for _ in range(200):
        answers = [
            Contender(rng.random() < 0.6, rng.randint(0, 6), rng.randint(1, 6)) for _ in range(rng.randint(1, 8))
        ]
        assert speed_rank(answers, measure=measure) == pytest.approx(duels(answers, measure))


def test_a_wrong_answer_gains_nothing_by_haste_and_costs_no_right_one_its_place():
    settings = RewardSettings({"accuracy": 1.0, "speed_rank": 0.2})
    for forwards in range(1, 40):
        hasty = replace(WRONG, forwards=forwards)
        rewards = settings.ranked([SLOW, FAST, hasty], [{"accuracy": 1.0}] * 2 + [{"accuracy": 0.0}])
        assert [reward for reward, _ in rewards] == [1.0, 1.2, 0.0]


def test_every_right_answer_is_worth_more_than_every_wrong_one():
    settings = RewardSettings({"accuracy": 1.0, "speed_rank": 0.2})
    for correct in product([True, False], repeat=4):
        answers = [Contender(one, 10, 1 + i) for i, one in enumerate(correct)]
        rewards = settings.ranked(answers, [{"accuracy": float(one)} for one in correct])
        right = [reward for (reward, _), one in zip(rewards, correct, strict=True) if one]
        wrong = [reward for (reward, _), one in zip(rewards, correct, strict=True) if not one]
        assert not right or not wrong or min(right) > max(wrong)


def test_rankings_are_summed_by_weight_in_the_order_of_the_weights():
    settings = RewardSettings({"speed_rank": 0.5, "accuracy": 1.0}, {"speed_rank": {"measure": "forwards"}})
    [(slow, parts), (fast, _)] = settings.ranked([SLOW, FAST], [{"accuracy": 1.0}, {"accuracy": 1.0}])
    assert (slow, fast) == (1.0, 1.5) and list(parts) == ["speed_rank", "accuracy"]
    assert settings.ranks and not RewardSettings({"accuracy": 1.0}).ranks


def test_a_setting_that_a_ranking_does_not_have_is_refused():
    for options, sentence in [
        ({"measure": "seconds"}, r"reward\.options\.speed_rank\.measure=seconds: choose one of tokens_per_forward, "),
        ({"by": 1}, "does not fit the reward speed_rank"),
    ]:
        with pytest.raises(DirlError, match=sentence):
            RewardSettings({"speed_rank": 1.0}, {"speed_rank": options})
    with pytest.raises(DirlError, match="did you mean speed_rank"):
        RewardSettings({"sped_rank": 1.0})
    with pytest.raises(DirlError, match="is a reward of whole answers"):
        RewardSettings({"accuracy": 1.0}, process={"speed_rank": 1.0})
