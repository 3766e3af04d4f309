"""What processes exchange of their answers is smaller, and the same to the last bit."""

import pickle
from array import array
from dataclasses import replace

import torch

from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.rollout.arrays import with_arrays
from dirl_cli.rollout.storage import Record, read_rollout, trajectory_to_json, write_rollout
from dirl_cli.types import Problem, Trajectory

GENERATOR = torch.Generator().manual_seed(0)
PROMPT = [5, 151_000]
SAMPLED = Trajectory(
    PROMPT,
    torch.randint(150_000, (4096,), generator=GENERATOR).tolist(),
    torch.randint(1, 5, (4096,), generator=GENERATOR).tolist(),
    torch.rand(4096, generator=GENERATOR).log().tolist(),
    "stop",
    denoise_forwards=1,
    forwards=1,
    stop_token_ids=(3,),
)


def record(trajectory: Trajectory) -> Record:
    return Record(Problem("a", "1+1?", "2"), 0, "2", trajectory, reward=1.0)


def test_every_value_comes_back_and_answers_to_one_prompt_share_it():
    rounded_by_float32 = replace(
        SAMPLED, token_ids=[7, 2], reveal_step=[0, 300], logprobs=[0.0, -0.1], entropies=[0.1, 2.0]
    )
    sent = with_arrays([record(SAMPLED), record(rounded_by_float32)])
    for one, other in zip(pickle.loads(pickle.dumps(sent)), (SAMPLED, rounded_by_float32), strict=True):
        assert list(one.trajectory.token_ids) == other.token_ids
        assert list(one.trajectory.reveal_step) == other.reveal_step
        assert [x.hex() for x in one.trajectory.logprobs] == [x.hex() for x in other.logprobs]
        assert list(one.trajectory.entropies) == other.entropies
        assert one.trajectory.num_revealed == other.num_revealed
        assert one.trajectory.is_hinted == other.is_hinted
        assert list(one.trajectory.completion_ids) == other.completion_ids
        assert one.trajectory.revealed_at(4) == other.revealed_at(4)
    assert sent[0].trajectory.prompt_ids is sent[1].trajectory.prompt_ids


def test_of_an_answer_under_way_the_versions_of_its_weights_are_sent_too():
    part = replace(SAMPLED, versions=[3] * 4000 + [400] * 96)
    [sent] = with_arrays([part])
    assert list(sent.token_versions) == part.versions
    assert trajectory_to_json(sent) == trajectory_to_json(part)


def test_what_is_still_under_way_is_sent_again_as_it_is():
    part = replace(SAMPLED, reveal_step=[300] * 4096, versions=[3] * 4000 + [400] * 96)
    again = with_arrays(with_arrays([part]))
    assert trajectory_to_json(again[0]) == trajectory_to_json(part)


def test_an_answer_takes_nine_bytes_a_token():
    sent = with_arrays([record(SAMPLED)])
    assert len(pickle.dumps(sent)) < 9.5 * 4096 < len(pickle.dumps([record(SAMPLED)])) / 1.5
    assert sent[0].trajectory.logprobs.itemsize == 4 and isinstance(sent[0].trajectory.reveal_step, bytearray)


def test_files_and_strips_are_those_of_lists(tmp_path):
    first, second = tmp_path / "step-000001.jsonl", tmp_path / "step-000002.jsonl"
    answer = replace(SAMPLED, prompt_ids=[1, 2, 3, 4])
    write_rollout(first, [record(answer)])
    [sent] = with_arrays([record(answer)])
    write_rollout(second, [sent])
    assert first.read_bytes() == second.read_bytes()
    assert isinstance(sent.trajectory.token_ids, array) and read_rollout(second) == [record(answer)]
    strips = trajectory_strip(answer, 4, 9), trajectory_strip(sent.trajectory, 4, 9)
    for name, tensor in vars(strips[0]).items():
        assert torch.equal(tensor, vars(strips[1])[name]), name
