"""Answers that a stream leaves under way, and another one ends, with other weights or the same."""

import json

import pytest
import torch

from dirl_cli.rollout.native import NativeSampler
from dirl_cli.rollout.sampler import Stint, continued
from dirl_cli.rollout.storage import trajectory_from_json, trajectory_to_json
from dirl_cli.training.logprobs import trajectory_logprobs
from dirl_cli.types import Decoding, Trajectory
from tests.helpers.small import small_lm

PROMPTS = [[5, 6, 7], [9, 8, 7, 6], [11] * 9]
OPTIONS = Decoding(strategy="sequential", temperature=1.0, max_new_tokens=30, stop_token_ids=(3, 4, 5))
Key = tuple[int, int]


def stream(sampler: NativeSampler, stint: Stint) -> dict[Key, Trajectory]:
    answers = {}
    for prompt, sample, trajectory in sampler.stream(PROMPTS, 3, OPTIONS, seeds=[1, 2, 3], stint=stint):
        answers[prompt, sample] = trajectory
    return answers


def in_stints(sampler: NativeSampler, stints: list[Stint]) -> dict[Key, Trajectory]:
    """All answers, each stint going on with what the one before it left, after a push of other weights."""
    answers: dict[Key, Trajectory] = {}
    under_way: dict[Key, Trajectory] = {}
    for version, stint in enumerate(stints):
        if version:
            push(sampler, version)
        stint.finished = set(answers)
        stint.under_way = under_way
        answers |= stream(sampler, stint)
        saved = json.loads(json.dumps([[*key, trajectory_to_json(part)] for key, part in stint.under_way.items()]))
        under_way = {(prompt, sample): trajectory_from_json(part) for prompt, sample, part in saved}
    return answers


def push(sampler: NativeSampler, version: int) -> None:
    """Weights that are reached by no other version."""
    generator = torch.Generator().manual_seed(version)
    weights = {
        name: weight + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in small_lm().model.state_dict().items()
    }
    sampler.update_weights(weights.items(), version)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_what_is_left_under_way_and_gone_on_with_is_the_answer_that_it_would_have_been(by_blocks):
    whole = stream(NativeSampler(small_lm(), 4, by_blocks), Stint(3))
    sampler = NativeSampler(small_lm(), 4, by_blocks)
    first = Stint(1)
    answers = stream(sampler, first)
    assert {key for key in whole if key[0] == 0} <= set(answers) < set(whole)
    assert first.under_way, "more than one prompt's answers were under way"

    second = Stint(3, finished=set(answers), under_way=first.under_way)
    answers |= stream(sampler, second)
    assert not second.under_way
    assert answers.keys() == whole.keys()
    for key, answer in whole.items():
        ours = answers[key]
        assert (ours.token_ids, ours.reveal_step, ours.stop_reason) == (
            answer.token_ids,
            answer.reveal_step,
            answer.stop_reason,
        )
        assert ours.logprobs == pytest.approx(answer.logprobs, abs=1e-5)
        assert (ours.forwards, ours.versions) == (answer.forwards, [])


def test_a_stream_ends_once_what_it_waits_for_is_there():
    sampler = NativeSampler(small_lm(), 9)
    assert stream(sampler, Stint(0)) == {}
    assert {key for key in stream(sampler, Stint(1)) if key[0] == 0} == {(0, 0), (0, 1), (0, 2)}
    more = Stint(1, more=3)
    assert len(stream(sampler, more)) >= 6
    assert len(stream(sampler, Stint(1, more=100))) == 9
    everything = {(prompt, sample) for prompt in range(3) for sample in range(3)}
    assert stream(sampler, Stint(0, more=1, finished=everything)) == {}, "as a process may have no answer to sample"
    assert list(sampler.stream([], 3, OPTIONS, seeds=[], stint=Stint(0, more=1))) == []


def test_the_log_probs_of_each_token_are_those_of_the_weights_that_drew_it():
    """Scored again, answer by answer, by a model of each version: the ratio of a correction has nothing else in it."""
    sampler = NativeSampler(small_lm(), 4)
    answers = in_stints(sampler, [Stint(0, more=1), Stint(1), Stint(2), Stint(3)])
    assert len(answers) == 9
    mixed = [answer for answer in answers.values() if answer.versions]
    assert mixed
    for answer in answers.values():
        versions = answer.token_versions
        assert versions == sorted(versions)
        assert answer.weights_version == versions[0]

    for version in range(4):
        scorer = NativeSampler(small_lm())
        if version:
            push(scorer, version)
        scored = trajectory_logprobs(scorer.lm, list(answers.values()), OPTIONS)
        for answer, logprobs in zip(answers.values(), scored, strict=True):
            of_version = [i for i, drawn in enumerate(answer.token_versions) if drawn == version]
            assert [answer.logprobs[i] for i in of_version] == pytest.approx(
                [logprobs[i] for i in of_version], abs=1e-5
            )


def test_stints_are_the_same_whenever_they_are_sampled():
    """In a sampler that was just started, as after a resume, to the last bit."""
    stints = [Stint(0, more=1), Stint(1), Stint(2), Stint(3)]
    answers, again = (in_stints(NativeSampler(small_lm(), 4), list(stints)) for _ in range(2))
    assert answers == again


def test_joined_answers_count_forwards_and_keep_versions_only_where_they_differ():
    old = Trajectory([1], [2, 3], [1, 1], [-0.5, -0.5], denoise_forwards=1, forwards=2, weights_version=4)
    new = Trajectory([1], [4], [2], [-0.25], "stop", denoise_forwards=2, forwards=2, weights_version=6)
    both = continued(old, new)
    assert both == Trajectory(
        [1], [2, 3, 4], [1, 1, 2], [-0.5, -0.5, -0.25], "stop", 3, 4, weights_version=4, versions=[4, 4, 6]
    )
    assert continued(old, continued(None, old)).versions == []
    assert trajectory_from_json(json.loads(json.dumps(trajectory_to_json(both)))) == both
    assert "versions" not in trajectory_to_json(old)
    with pytest.raises(ValueError, match="token_ids and versions differ in length"):
        trajectory_from_json(json.loads(json.dumps(trajectory_to_json(both))) | {"versions": [4]})
