"""Process rewards: what a user's function gives the steps or the blocks of an answer."""

from dataclasses import replace
from pathlib import Path

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.reward.process import by_step
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardSettings
from dirl_cli.rl.batch import reward_shares
from dirl_cli.rl.groups import revealed_blocks
from dirl_cli.types import Problem
from tests.helpers.answers import BLOCK, answer

JUDGE = """
def a_block(answer):
    return [float(len(block.text)) for block in answer.blocks]

def a_step(answer):
    return [float(len(step)) for block in answer.blocks for step in block.steps]

def wrong(answer):
    return [1.0] * 99

def whole(answer):
    return 1.0
"""


def test_a_token_has_its_share_of_what_its_step_earned():
    one = replace(answer([5, 6], 6, seed=0), reveal_step=[1, 2, 1, 2, 3, 3])
    assert reward_shares(one, [1.0, 2.0, 3.0, 4.0, 5.0], BLOCK) == [1.0, 2.0, 3.0, 4.0, 2.5, 2.5]
    assert reward_shares(one, [1.0, 2.0], BLOCK) == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert reward_shares(one, [], BLOCK) == [0.0] * 6


def test_values_of_blocks_are_those_of_their_last_steps():
    assert by_step([5.0, 7.0], [3, 1]) == [0.0, 0.0, 5.0, 7.0]
    assert by_step([1.0, 2.0, 3.0, 4.0], [3, 1]) == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="3 values for 2 blocks and 4 denoising steps"):
        by_step([1.0, 2.0, 3.0], [3, 1])


def judged(directory: Path, weights: dict[str, float], on_error: str = "stop"):
    (directory / "judge.py").write_text(JUDGE)
    named = {f"{directory}/judge.py:{name}": weight for name, weight in weights.items()}
    one = replace(answer([5, 6], 6, seed=0), reveal_step=[1, 2, 1, 2, 3, 3], denoise_forwards=5)
    blocks = revealed_blocks(lambda ids: "x" * len(ids), one, BLOCK)
    with RewardComputer(RewardSettings({"accuracy": 1.0}, process=named, on_error=on_error, workers=1)) as computer:
        asked = Answer.of(Problem("p", "?", "1"), one, "", 8, BLOCK, blocks)
        return dict(computer.compute([("key", asked)]))["key"], computer


def test_process_rewards_are_computed_by_workers_and_summed_by_step(tmp_path):
    result, _ = judged(tmp_path, {"a_block": 10.0, "a_step": 1.0})
    assert result.process == [1.0, 21.0, 1.0, 1.0, 42.0]  # of blocks of 2 and 4 tokens, in 2 and 3 steps


@pytest.mark.parametrize(("name", "reason"), [("wrong", "it gave 99 values for 2 blocks"), ("whole", "it gave 1.0")])
def test_a_process_reward_of_another_shape_is_a_failed_reward(tmp_path, name, reason):
    with pytest.raises(DirlError, match=reason):
        judged(tmp_path, {name: 1.0})
    result, computer = judged(tmp_path, {name: 1.0}, on_error="exclude")
    assert result is None and sum(computer.excluded.values()) == 1
