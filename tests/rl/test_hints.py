"""Parts of a solution in answers to problems that nothing else solves: how they are drawn, and what becomes of them."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from torch import Generator

from dirl_cli.cli.launch import check_values
from dirl_cli.data.problem_rows import problem
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.rl.curriculum import Curriculum
from dirl_cli.rl.hints import Hints, cut_at
from dirl_cli.rl.replay import continues
from dirl_cli.rl.rollout_metrics import records, rollout_metrics
from dirl_cli.rl.rollout_state import RolloutState
from dirl_cli.rollout.storage import Record, read_rollout
from dirl_cli.types import HELD, Problem, Trajectory
from tests.helpers.fake_rollouts import MIXED, POOL, SAME, each, order, source
from tests.helpers.rl_runs import config, lines, run, save_sharp_model, updates, weights

SOLUTION = list(range(100, 120))


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def test_chunks_follow_one_another_and_an_end_that_is_shorter_than_any_is_left_out():
    for seed in range(50):
        chunks = Hints(1, (0.2, 0.6), (5, 10)).chunks(23, generator(seed))
        assert [i for chunk in chunks for i in chunk] == list(range(chunks[-1].stop))
        assert all(5 <= len(chunk) <= 10 for chunk in chunks)
        assert 23 - chunks[-1].stop < 5
    assert Hints(1, (0.2, 0.6), (5, 10)).chunks(3, generator()) == [range(3)]  # a short solution is one chunk


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.2, 1), (0.25, 1), (0.5, 2), (0.6, 3), (1.0, 4)])
def test_as_many_chunks_are_held_as_the_share_says_each_where_it_stands_in_the_solution(share, held):
    hint = Hints(1, (share, share), (5, 5)).hint(SOLUTION, 100, generator())
    assert len(hint) == 5 * held
    assert all(token == SOLUTION[index] for index, token in hint.items())
    assert set(Counter(index // 5 for index in hint).values()) <= {5}


def test_each_answer_draws_its_own_share_and_chunks():
    hints = [Hints(1, (0.2, 0.6), (2, 3)).hint(SOLUTION, 100, generator(seed)) for seed in range(20)]
    assert len({len(hint) for hint in hints}) > 3
    assert len({tuple(hint) for hint in hints}) > 15


def test_the_last_token_of_an_answer_is_free():
    assert Hints(1, (1.0, 1.0), (1, 1)).hint(SOLUTION, 6, generator()) == {i: SOLUTION[i] for i in range(5)}


def test_a_solution_is_cut_where_an_answer_would_end():
    assert cut_at([5, 6, 2, 7], {2, 3}) == [5, 6]
    assert cut_at([5, 6], {2, 3}) == [5, 6]


def record(sample: int, correct: bool) -> Record:
    return Record(Problem("a", "?", "!"), sample, str(sample), Trajectory([1], [sample, 9], [1, 1]), correct=correct)


def test_right_answers_take_the_places_of_the_first_and_one_of_the_groups_own_stays():
    group = [record(sample, False) for sample in (0, 1, 3)]
    hinted = [replace(record(sample, sample != 1), completion=f"hinted {sample}") for sample in range(4)]
    two = Hints(2, (0.2, 0.6), (5, 10)).take_in(group, hinted, generator())
    assert [one.sample for one in two] == [0, 1, 3]
    assert [one.correct for one in two] == [True, True, False]
    assert {one.completion for one in two[:2]} < {"hinted 0", "hinted 2", "hinted 3"}
    many = Hints(9, (0.2, 0.6), (5, 10)).take_in(group, hinted, generator())
    assert [one.correct for one in many] == [True, True, False]
    none = Hints(2, (0.2, 0.6), (5, 10)).take_in(group, hinted[1:2], generator())
    assert none == group


# Answers are the sample's number, or the token 5 of a hint, which is right.
WRONG, RIGHT_WITH_HINT = SAME, [*SAME, 0.0, 0.0, 0.0, 1.0]


def hinting(rewards, **options):
    return source(rewards, hints=Hints(1, (1.0, 1.0), (1, 1)), solutions=[[5]] * len(POOL), **options)


def test_groups_that_are_all_wrong_are_sampled_again_with_hints():
    first, second, *_ = order()
    ours = hinting({**each(MIXED), first: RIGHT_WITH_HINT}, max_rounds=1)
    rollout = ours.collect(0)
    assert [one.correct for one in rollout.groups[0]] == [True, False]
    assert rollout.groups[0][0].trajectory.reveal_step == [HELD, 1]
    assert [one.problem.id for one in rollout.groups[1]] == [second] * 2
    assert [one.correct for one in rollout.sampled[0]] == [False, False]
    assert [[one.problem.id for one in group] for group in rollout.hinted] == [[first] * 2]

    metrics = rollout_metrics(rollout, 2)
    assert (metrics["hinted"], metrics["hinted_accuracy"]) == (0.5, 1.0)
    assert metrics["accuracy"] == 0.25  # of what was sampled without hints
    assert (metrics["kept"], metrics["kept_accuracy"], "excluded" in metrics) == (1.0, 0.5, False)

    # Every answer is on record once, and what nothing was learned from makes no group of both kinds.
    written = records(rollout.groups, rollout.sampled + rollout.hinted)
    assert len(written) == len({id(one.trajectory) for one in written}) == 6
    replaced, unused = written[4:]
    assert (replaced.trajectory.is_hinted, unused.trajectory.is_hinted) == (False, True)
    assert not continues(replaced, unused) and continues(replaced, replace(replaced, sample=unused.sample))


def test_hints_that_help_nothing_leave_the_groups_as_they_were():
    plain, ours = source(each(WRONG), max_rounds=2), hinting(each([*SAME, 0.0, 0.0, 0.0, 0.0]), max_rounds=2)
    assert ours.collect(0).sampled == plain.collect(0).sampled
    assert ours.state == plain.state


def test_solved_groups_are_not_asked_twice():
    ours = hinting(each(MIXED), max_rounds=1)
    rollout = ours.collect(0)
    assert rollout.hinted == [] and rollout_metrics(rollout, 2)["hinted"] == 0
    assert len(ours.sampler.asked) == 2


def test_the_pass_rate_of_the_curriculum_is_the_one_without_hints():
    ours = hinting(each(RIGHT_WITH_HINT), curriculum=Curriculum(0.1, 0.9, skips=1), max_rounds=1)
    ours.collect(0)
    assert len(ours.state.rests_until) == 2


def test_hinted_groups_are_left_over_for_the_next_step_also_after_a_checkpoint():
    ours, other = (hinting(each(RIGHT_WITH_HINT), problems_per_step=1, max_rounds=1) for _ in range(2))
    surplus = [ours.collect(0).groups[0]]
    ours.state = replace(ours.state, surplus=surplus)
    restored = RolloutState.from_json(json.loads(json.dumps(ours.state.to_json())))
    other.state = restored
    assert restored.surplus[0][0].trajectory.is_hinted
    assert ours.collect(1) == other.collect(1)


@pytest.mark.parametrize(
    ("fields", "solution"),
    [
        ({"answer": "4", "solution": "2+2=4"}, "2+2=4"),
        ({"answer": "4", "response": "so 4", "solution": "2+2=4"}, "so 4"),
        ({"answer": "2+2=4\n#### 4"}, "2+2=4"),
        ({"answer": "4", "solution": " "}, ""),
        ({"answer": "4", "solution": ["2+2"]}, ""),
    ],
)
def test_a_row_has_its_solution_in_one_of_several_columns(fields, solution):
    assert problem(Row("line 1", {"question": "2+2?", **fields}), "a").solution == solution


# A run of the whole command: a random model answers nothing right, but a hint that is the whole solution nearly does.
WHOLE_SOLUTIONS = (
    "reward=accuracy",
    "~reward.weights",
    "~reward.options",
    "+reward.weights={accuracy: 1.0}",
    "rl.filter=accuracy",
    "rl.hints=2",
    "rl.hint_share=[0.9,1.0]",
    "rl.hint_tokens=[1,2]",
    f"decoding.stop_token_ids={[2, *range(97, 202), *range(203, 280), *range(281, 373)]}",
    "decoding.max_new_tokens=40",
    "rl.max_rounds=2",
    "eval_problems=0",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run(config(model, *WHOLE_SOLUTIONS), out)
    return out


def test_a_run_learns_from_problems_that_it_never_solves_and_says_how_many(finished):
    found = lines(finished)
    assert all(line["hinted"] > 0.5 and line["accuracy"] < 0.5 for line in found)
    assert any(line["hinted_accuracy"] > 0 and line["loss"] != 0 for line in found if "loss" in line)
    assert any(line.get("mismatch_max", 0) < 1e-4 for line in found)

    learned = [
        one
        for step in range(1, 5)
        for one in read_rollout(finished / f"rollouts/step-{step:06d}.jsonl")
        if one.learned_from
    ]
    hinted = [one for one in learned if one.trajectory.is_hinted]
    assert hinted and all(one.correct and one.advantage > 0 for one in hinted)
    assert any(not one.trajectory.is_hinted for one in learned)


def test_a_run_with_hints_goes_on_to_the_same_bytes(finished, model, tmp_path):
    run(config(model, *WHOLE_SOLUTIONS), tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    run(config(model, *WHOLE_SOLUTIONS), tmp_path)
    assert weights(tmp_path) == weights(finished)
    for step in (3, 4):
        file = f"rollouts/step-{step:06d}.jsonl"
        assert (tmp_path / file).read_text() == (finished / file).read_text()


def test_a_replay_of_a_run_with_hints_learns_the_same(finished, model, tmp_path):
    run(config(model, *WHOLE_SOLUTIONS, "rl.hints=0", f"rl.replay={finished}"), tmp_path)
    assert weights(tmp_path) == weights(finished)
    assert updates(tmp_path) == updates(finished)
    assert [line["accuracy"] for line in lines(tmp_path)] == [line["accuracy"] for line in lines(finished)]


def test_answers_with_hints_that_no_group_took_are_not_learned_from_when_rewarded_anew(finished, model, tmp_path):
    run(config(model, *WHOLE_SOLUTIONS, "rl.hints=0", f"rl.replay={finished}", "rl.rescore=true"), tmp_path)
    leftover = False
    for step in (1, 2, 3, 4):
        groups = groupby(read_rollout(tmp_path / f"rollouts/step-{step:06d}.jsonl"), lambda one: one.problem.id)
        for _, group in groups:
            hinted = [one for one in group if one.trajectory.is_hinted and not one.learned_from]
            leftover = leftover or any(one.correct for one in hinted)
        learned = [one for one in read_rollout(tmp_path / f"rollouts/step-{step:06d}.jsonl") if one.learned_from]
        for _, group in groupby(learned, lambda one: one.problem.id):
            assert not all(one.trajectory.is_hinted for one in group)
    assert leftover


def test_hints_that_are_off_change_no_byte(model, tmp_path):
    run(config(model, "steps=2"), tmp_path / "plain")
    run(config(model, "steps=2", "rl.hint_share=[0.5,0.5]", "rl.hint_tokens=[1,1]"), tmp_path / "off")
    assert weights(tmp_path / "off") == weights(tmp_path / "plain")
    file = "rollouts/step-000002.jsonl"
    assert (tmp_path / "off" / file).read_text() == (tmp_path / "plain" / file).read_text()


def test_problems_without_solutions_are_told_before_anything_starts(model, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "2+2?", "answer": "4", "solution": "2+2=4"}, {"id": "hard", "question": "3+3?", "answer": "6"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(model, *WHOLE_SOLUTIONS, "data=file", f"data.path={file}")
    with pytest.raises(DirlError, match="problem hard has no solution to take hints from: give its row a solution"):
        run(cfg, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rl.hints=3"], "of rl.group_size=3 answers some must stay as they are"),
        (["rl.hints=1", "rl.hint_share=[0.6,0.2]"], r"give the least and the largest share"),
        (["rl.hints=1", "rl.hint_tokens=[5]"], r"give the fewest and the most tokens of a chunk"),
        (["rl.hints=1", "rl.replay=runs/rl/a"], "rl.replay samples none"),
    ],
)
def test_what_hints_cannot_be_is_told(model, words, sentence):
    with pytest.raises(DirlError, match=sentence):
        check_values("rl", config(model, *words))


def test_hints_want_the_native_engine(model, tmp_path):
    with pytest.raises(DirlError, match=r"rl\.hints wants rollout=native"):
        run(config(model, "rl.hints=1", "rollout=lmdeploy"), tmp_path)
