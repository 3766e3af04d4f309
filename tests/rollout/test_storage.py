"""Rollouts on disk come back as they were."""

import json
import math
from dataclasses import replace

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.rollout.storage import (
    Record,
    read_rollout,
    require_learnable,
    rollout_files,
    rollout_path,
    write_rollout,
)
from dirl_cli.types import Problem, Trajectory
from tests.helpers.small import MASK, small_lm

TRAJECTORY = Trajectory(
    prompt_ids=[5, 6],
    token_ids=[7, 8, 9, 2],
    reveal_step=[1, 2, 2, 1],
    logprobs=[-0.1, math.log(1 / 3), -5e-324, -0.0],
    stop_reason="stop",
    denoise_forwards=2,
    forwards=3,
    weights_version=11,
    stop_token_ids=(2, 3),
)
RECORD = Record(
    Problem("p-1", "7+5 → ?\nand\u2028then", "12", "sums"),
    sample=3,
    completion=r"7+5=12 \boxed{12}",
    trajectory=TRAJECTORY,
    reward=1.1,
    parts={"accuracy": 1.0, "boxed": 0.1},
    correct=True,
    advantage=0.7071067811865476,
    learned_from=True,
)


def test_records_come_back_to_the_last_bit(tmp_path):
    path = rollout_path(tmp_path / "rollouts", 12)
    unscored = Record(RECORD.problem, 4, "", replace(TRAJECTORY, stop_reason="length", stop_token_ids=()))
    write_rollout(path, [RECORD, unscored])
    assert path.name == "step-000012.jsonl"
    found = read_rollout(path)
    assert found == [RECORD, unscored]
    before, after = TRAJECTORY.logprobs, found[0].trajectory.logprobs
    assert [x.hex() for x in after] == [x.hex() for x in before]


def test_entropies_come_back_where_they_were_recorded_and_take_no_room_elsewhere(tmp_path):
    path = rollout_path(tmp_path, 1)
    recorded = replace(RECORD, trajectory=replace(TRAJECTORY, entropies=[0.5, 0.0, 1.25, 2.0]))
    write_rollout(path, [recorded, RECORD])
    assert read_rollout(path) == [recorded, RECORD]
    assert path.read_text().count("entropies") == 1
    path.write_text(path.read_text().replace("[0.5, 0.0, ", "["))
    with pytest.raises(DirlError, match="line 1: token_ids and entropies differ in length; correct"):
        read_rollout(path)


def test_an_answer_of_before_its_block_size_was_noted_is_read(tmp_path):
    path = tmp_path / "step-000001.jsonl"
    write_rollout(path, [replace(RECORD, trajectory=replace(TRAJECTORY, block_size=2))])
    assert read_rollout(path)[0].trajectory.block_size == 2
    path.write_text(path.read_text().replace(', "block_size": 2', ""))
    assert read_rollout(path) == [RECORD]


def test_how_a_puzzle_is_verified_comes_back_and_old_answers_are_mathematics(tmp_path):
    path = tmp_path / "step-000001.jsonl"
    puzzle = replace(RECORD.problem, verifier="countdown", details={"numbers": [7, 5], "target": 12})
    write_rollout(path, [replace(RECORD, problem=puzzle)])
    assert read_rollout(path)[0].problem == puzzle
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"details": [7, 5]}))
    with pytest.raises(DirlError, match="line 1: details is not dict"):
        read_rollout(path)
    del line["verifier"], line["details"]
    path.write_text(json.dumps(line))
    assert read_rollout(path) == [RECORD]


def test_a_line_holds_what_people_look_for(tmp_path):
    write_rollout(tmp_path / "step-000001.jsonl", [RECORD])
    (line,) = (tmp_path / "step-000001.jsonl").read_text().splitlines()
    shown = json.loads(line)
    assert (shown["problem"], shown["sample"], shown["answer"], shown["parts"]) == ("p-1", 3, "12", RECORD.parts)
    assert shown["reveal_step"] == [1, 2, 2, 1]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "step-000001.jsonl"
    write_rollout(path, [RECORD])

    def records():
        yield RECORD
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollout(path, records())
    assert read_rollout(path) == [RECORD]
    assert list(rollout_files(tmp_path)) == [1]


def test_the_files_of_a_run_are_found_in_the_order_of_steps(tmp_path):
    for step in (10, 9, 1_000_000):
        write_rollout(rollout_path(tmp_path / "rollouts", step), [])
    assert list(rollout_files(tmp_path)) == list(rollout_files(tmp_path / "rollouts")) == [9, 10, 1_000_000]
    assert read_rollout(rollout_files(tmp_path)[9]) == []
    with pytest.raises(DirlError, match="holds no step"):
        rollout_files(tmp_path / "elsewhere")


def write_lines(path, **changed):
    """A good line, then one with `changed` values; None leaves the key out."""
    write_rollout(path, [RECORD])
    good = path.read_text()
    bad = {key: value for key, value in {**json.loads(good), **changed}.items() if value is not None}
    path.write_text(good + json.dumps(bad) + "\n")


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"reveal_step": None}, "has no reveal_step"),
        ({"token_ids": [7, 8, 9]}, "differ in length"),
        ({"token_ids": [7, 8, 9, "2"]}, "token_ids holds something that is not int"),
        ({"stop_reason": "bored"}, "stop_reason is called bored"),
        ({"reward": "high"}, "reward is not float"),
        ({"parts": {"accuracy": []}}, "accuracy is not float"),
        ({"correct": 1}, "correct is not bool"),
        ({"forwards": 0, "denoise_forwards": 0}, "denoise_forwards holds 0, and counts from 1 on"),
        ({"forwards": 1}, "denoise_forwards is 2 of 1 forwards"),
        ({"token_ids": [7, 8, 9, -2]}, "token_ids holds -2, and counts from 0 on"),
        ({"prompt_ids": [10**30]}, "prompt_ids holds 10000000000000000000, and counts from 0 on"),
        ({"reveal_step": [1, 2, 2, -1]}, "reveal_step holds -1, and counts from 0 on"),
        ({"token_ids": [], "reveal_step": [], "logprobs": []}, "token_ids is empty"),
        ({"logprobs": [-0.1, 0.5, 0.0, 0.0]}, "logprobs holds what is no logarithm of a probability"),
        ({"logprobs": [-0.1, math.nan, 0.0, 0.0]}, "logprobs holds what is no logarithm of a probability"),
        ({"logprobs": [-0.1, -math.inf, 0.0, 0.0]}, "logprobs holds what is no logarithm of a probability"),
        ({"reward": math.nan}, "reward is no finite number"),
        ({"reward": 10**400}, "reward is no finite number"),
        ({"parts": {"accuracy": math.inf}}, "accuracy is no finite number"),
        ({"advantage": -1e300}, "advantage is no finite number, or beyond 1e\\+15"),
        ({"sample": -1}, "sample holds -1"),
        ({"weights_version": 2**63}, "weights_version holds 9223372036854775808"),
        ({"block_size": 0}, "block_size holds 0, and counts from 1 on"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, changed, reason):
    path = tmp_path / "step-000001.jsonl"
    write_lines(path, **changed)
    with pytest.raises(DirlError, match=rf"step-000001.jsonl line 2.*{reason}"):
        read_rollout(path)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"block_size": 2}, "was sampled in blocks of 2 and the model's are of 4: set model.block_size as it was"),
        ({"prompt_ids": [5, 6, 7]}, "prompt_ids and token_ids are 7 tokens, which is not whole blocks of 4"),
        ({"prompt_ids": [5] * 256}, "prompt_ids and token_ids are 260 tokens, and the model has 256 positions"),
        ({"reveal_step": [1, 2, 3, 5]}, "reveal_step holds 5, and a block of 4 has no more steps than tokens"),
        ({"reveal_step": [1, 1, 1, 2**30]}, "reveal_step holds 1073741824"),
        ({"token_ids": [7, 8, 9, 50]}, "token 50 is beyond the model's 50"),
        ({"prompt_ids": [5, 6, 7, 1000]}, "token 1000 is beyond the model's 50"),
        ({"token_ids": [7, 8, 9, MASK]}, f"token_ids holds {MASK}, which stands for no text and is never sampled"),
    ],
)
def test_what_a_model_cannot_have_answered_is_named(changed, reason):
    possible = replace(TRAJECTORY, prompt_ids=[5, MASK, 6, 7])  # whoever asks may write the mask token
    require_learnable("here", possible, small_lm())
    with pytest.raises(DirlError, match=f"^here.*{reason}"):
        require_learnable("here", replace(possible, **changed), small_lm())


@pytest.mark.parametrize("line", [b"{", b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "step-000001.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DirlError, match="line 1"):
        read_rollout(path)


def test_a_place_that_cannot_be_written_or_read_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DirlError, match="cannot be written"):
        write_rollout(tmp_path / "file" / "step-000001.jsonl", [RECORD])
    with pytest.raises(DirlError, match="cannot be read"):
        read_rollout(tmp_path / "step-000001.jsonl")
