"""Which sampled answers are learned from, and what of them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dirl_cli.errors import DirlError
from dirl_cli.rollout.storage import Record, rollout_path, write_rollout
from dirl_cli.sft.answer_credits import grade, grade_once, read_credits
from dirl_cli.sft.answer_files import answer_files
from dirl_cli.sft.sampled_answers import SampledAnswers
from dirl_cli.types import HELD, Problem, Trajectory
from tests.helpers.small import small_lm

LM = small_lm()
FAST, SLOW, SLOWEST = [1, 1, 1, 1], [1, 2, 2, 1], [4, 2, 1, 3]  # 1, 2 and 4 forwards


def record(problem: int, token: int, steps: list[int], reward: float | None = 1.0, stopped: bool = True) -> Record:
    """An answer that is one token over and over, to a prompt that is the problem's number."""
    trajectory = Trajectory(
        [problem, 5, 6, 7],
        [token] * 4,
        steps,
        [-1.0] * 4,
        "stop" if stopped else "length",
        max(steps),
        max(steps) + 1,
        stop_token_ids=(2,),
        block_size=4,
    )
    parts = {} if reward is None else {"accuracy": reward}
    return Record(Problem(str(problem), "?", "!"), token, "", trajectory, reward, parts, reward == 1)


def written(directory: Path, *steps: list[Record]) -> SampledAnswers:
    for step, records in enumerate(steps, start=1):
        write_rollout(rollout_path(directory / "rollouts", step), records)
    return SampledAnswers(str(directory), "mine")


def tables(source: SampledAnswers, lm=LM, longest: int = 100):
    return source.tables(lm, grade, longest)


def learned(table) -> list[tuple[int, int]]:
    """Problem and token of each answer."""
    return [(table[i][0][0], table[i][0][4]) for i in range(len(table))]


def test_the_right_answers_are_learned_from_as_they_were_sampled(tmp_path):
    source = written(tmp_path, [record(10, 20, SLOW), record(10, 21, FAST, 0.0)], [record(11, 22, SLOWEST)])
    both = tables(source)
    assert learned(both.training) == [(10, 20), (11, 22)] and len(both.held_out) == 0
    assert both.training[0] == ([10, 5, 6, 7, 20, 20, 20, 20], [False] * 4 + [True] * 4)
    assert both.training.revealed_at(0) == [HELD] * 4 + SLOW
    summary = f"2 training and 0 held-out answers to 2 problems, from 3 answers in {tmp_path}"
    assert both.remarks == [
        f"{summary}; 1 left out that are not correct",
        "  they were sampled at 1.33 tokens per denoising forward",
    ]


def test_the_tail_of_an_answer_is_learned_since_the_sampler_fills_it_too(tmp_path):
    ended = record(10, 20, SLOW)
    ended = replace(ended, trajectory=replace(ended.trajectory, token_ids=[20, 2, 30, 31]))
    table = tables(written(tmp_path, [ended])).training
    assert table[0][1] == [False] * 4 + [True] * 4


def test_a_reward_may_say_what_is_kept_in_place_of_being_right(tmp_path):
    source = written(tmp_path, [record(10, 20 + i, SLOW, reward) for i, reward in enumerate([1.0, 0.5, 0.4, 0.0])])
    assert learned(tables(replace(source, least_reward=0.5)).training) == [(10, 20), (10, 21)]
    assert len(tables(replace(source, least_reward=float("-inf"))).training) == 4
    assert "2 left out that have a reward below 0.5" in tables(replace(source, least_reward=0.5)).remarks[0]


def test_the_fastest_right_answers_to_each_problem_are_kept(tmp_path):
    answers = [record(10, 20 + i, steps) for i, steps in enumerate([SLOWEST, SLOW, FAST, FAST])]
    wrong = record(10, 30, FAST, 0.0)
    source = written(tmp_path, [wrong, *answers, record(11, 25, SLOWEST)])
    assert learned(tables(replace(source, fastest=1)).training) == [(10, 22), (11, 25)]
    assert learned(tables(replace(source, fastest=3)).training) == [(10, 21), (10, 22), (10, 23), (11, 25)]
    half = tables(replace(source, fastest=0.5))
    assert learned(half.training) == [(10, 22), (10, 23), (11, 25)]
    assert "2 left out that others to the problem are faster than" in half.remarks[0]


def test_forwards_are_those_of_the_reveal_steps_over_all_blocks(tmp_path):
    """What the sampler noted is of no account: of two blocks the steps are added up."""
    longer = record(10, 20, FAST + SLOW)
    longer = replace(longer, trajectory=replace(longer.trajectory, token_ids=[20] * 8, logprobs=[-1.0] * 8))
    other = record(10, 21, SLOWEST)
    longer = replace(longer, trajectory=replace(longer.trajectory, denoise_forwards=9, forwards=9))
    source = replace(written(tmp_path, [other, longer]), fastest=1)
    assert learned(tables(source).training) == [(10, 20)]


def test_whole_problems_are_held_out(tmp_path):
    source = written(tmp_path, [record(10 + i, 20 + k, SLOW) for i in range(6) for k in range(2)])
    both = tables(replace(source, held_out=2))
    trained, unseen = ({problem for problem, _ in learned(table)} for table in (both.training, both.held_out))
    assert (len(trained), len(unseen)) == (4, 2) and not trained & unseen
    assert len(tables(replace(source, held_out=0.5)).held_out) == 6
    assert learned(tables(replace(source, held_out=2)).held_out) == learned(both.held_out)
    assert any(learned(tables(replace(source, held_out=2, seed=s)).held_out) != learned(both.held_out) for s in (1, 2))
    held_out = replace(source, held_out=2)
    assert {problem.id for problem in held_out.problems()} == {str(problem) for problem in unseen}
    assert {problem.id for problem in held_out.training_problems()} == {str(problem) for problem in trained}
    with pytest.raises(DirlError, match="has answers to 6 problems, so 6 cannot be held out"):
        tables(replace(source, held_out=6))


def test_an_answer_counts_once_and_a_hinted_one_not_at_all(tmp_path):
    left_over = record(10, 20, SLOW)
    hinted = record(10, 21, [HELD, 1, 1, 1])
    source = written(tmp_path, [left_over, hinted], [replace(left_over, advantage=0.5, learned_from=True)])
    assert learned(tables(source).training) == [(10, 20)]
    assert "to 1 problem, from 2 answers in" in tables(source).remarks[0]
    assert "; 1 left out that were given hints" in tables(source).remarks[0]
    nothing = "holds no answers without hints: sample some with"
    with pytest.raises(DirlError, match=nothing):
        tables(written(tmp_path / "hinted", [hinted]))
    (tmp_path / "completions.jsonl").write_text("")
    with pytest.raises(DirlError, match=nothing):
        tables(SampledAnswers(str(tmp_path / "completions.jsonl")))


def test_long_answers_are_left_out(tmp_path):
    both = tables(written(tmp_path, [record(10, 20, SLOW)]), longest=7)
    assert len(both.training) == 0 and "1 left out that with the prompt hold more than 7 tokens" in both.remarks[0]


def test_answers_in_other_blocks_than_the_models_are_learned_from(tmp_path):
    small = record(10, 20, [2, 1, 1, 1])
    small = replace(small, trajectory=replace(small.trajectory, block_size=2))
    table = tables(written(tmp_path, [small])).training
    assert table.revealed_at(0) == [HELD] * 4 + [2, 1, 3, 3]


def test_an_answer_that_no_such_model_gave_is_told_with_its_line(tmp_path):
    broken = record(10, 20, [5, 1, 1, 1])
    with pytest.raises(DirlError, match=r"step-000001.jsonl line 2: reveal_step holds 5"):
        tables(written(tmp_path, [record(10, 21, SLOW), broken]))


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    numbers = replace(LM, tokenizer=SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids))))
    said = replace(record(10, 20, SLOW), completion="20 20 20 20")
    assert len(tables(written(tmp_path / "a", [said]), numbers).training) == 1
    other = replace(said, completion="something else")
    silent = replace(said, completion="", trajectory=replace(said.trajectory, token_ids=[2, 20, 20, 20]))
    for number, answers in enumerate(([other], [silent, other])):
        source = written(tmp_path / str(number), answers)
        with pytest.raises(DirlError, match=f"line {len(answers)}: the model's tokenizer reads its tokens otherwise"):
            tables(source, numbers)
    assert len(tables(written(tmp_path / "c", [silent]), numbers).training) == 1


def completion(index: int, sample: int, text: str, **columns) -> dict:
    """A line as `dirl generate` writes it."""
    answer = record(10 + index, 20 + sample, SLOW).trajectory
    line = {"index": index, "sample": sample, "text": text, **vars(answer), **columns}
    del line["weights_version"]
    return line


def generated(directory: Path, *lines: dict) -> SampledAnswers:
    (directory / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SampledAnswers(str(directory), "mine")


def test_what_generate_left_is_graded_where_its_prompts_have_an_answer(tmp_path):
    asked = {"question": "3+4?", "ground_truth_answer": "7"}
    source = generated(
        tmp_path,
        completion(0, 0, r"\boxed{7}", **asked),
        completion(0, 1, r"\boxed{8}", **asked),
        completion(0, 2, r"\boxed{7}", stop_reason="length", **asked),
        completion(1, 0, r"\boxed{7}", question="what?"),
    )
    assert learned(tables(source).training) == [(10, 20)]
    assert learned(tables(replace(source, least_reward=1.0)).training) == [(10, 20)]
    assert len(tables(replace(source, least_reward=float("-inf"))).training) == 4
    assert source.training_problems()[0] == Problem("mine-0", "3+4?", "7")
    assert learned(tables(replace(source, path=f"{tmp_path}/completions.jsonl")).training) == [(10, 20)]


def test_a_broken_completion_is_told_with_its_line(tmp_path):
    good = completion(0, 0, "a", question="?")
    for broken, reason in (
        ({**good, "reveal_step": [1]}, "line 2: token_ids, reveal_step and logprobs differ in length"),
        ({name: good[name] for name in good if name != "text"}, "line 2 has no text"),
        ({**good, "text": None}, "index 0 has no text, as its model had no tokenizer: sample with one that has"),
        (
            {name: good[name] for name in good if name != "stop_token_ids"},
            "index 0 has no stop_token_ids, which earlier versions did not write: sample it again",
        ),
        ([], "line 2: a completion is an object"),
    ):
        with pytest.raises(DirlError, match=reason):
            tables(generated(tmp_path, good, broken))


def test_code_that_answers_name_runs_only_where_the_config_names_it(tmp_path):
    own = replace(record(10, 20, SLOW), problem=Problem("10", "?", "!", verifier="mine.score"))
    source = replace(written(tmp_path, [own, record(11, 21, SLOW)]), held_out=0)
    assert len(tables(source).training) == 2  # whose rewards are on record
    with pytest.raises(DirlError, match=r"let it run with data\.scorers="):
        source.training_problems()
    assert len(replace(source, scorers=["mine.score"]).training_problems()) == 2


def test_no_answer_is_graded_by_code_that_the_config_does_not_name(tmp_path):
    """Only the name of it is in the data: importing it would be running it."""
    ran = tmp_path / "ran"
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(ran)!r}, 'w')\ndef score(problem, answer):\n    return 1.0\n")
    name = f"{evil}:score"
    own = replace(record(10, 20, SLOW, None), problem=Problem("10", "?", "!", verifier=name), completion="yes")
    source = written(tmp_path, [own, record(11, 21, SLOW)])
    with pytest.raises(DirlError, match=r"problem 10 of .* names the code .*evil\.py:score: where you trust it"):
        tables(source)
    assert not ran.exists()
    assert learned(tables(replace(source, least_reward=float("-inf"))).training) == [(10, 20), (11, 21)]
    assert not ran.exists()
    assert learned(tables(replace(source, scorers=[name])).training) == [(10, 20), (11, 21)] and ran.exists()


def test_what_could_not_be_graded_is_told_apart_from_what_is_wrong(tmp_path):
    def is_seven(attempts):
        return [None if text == "slow" else float(text == "7") for _, text in attempts]

    asked = {"question": "3+4?", "ground_truth_answer": "7"}
    texts = ["7", "8", "slow", "slow", "7"]
    source = generated(
        tmp_path,
        *(completion(0, i, text, **asked) for i, text in enumerate(texts)),
        completion(0, 5, "7", stop_reason="length", **asked),
        completion(1, 0, "7", question="what?"),
    )
    both = source.tables(LM, is_seven, 100)
    assert learned(both.training) == [(10, 20), (10, 24)]
    reasons = "2 left out that are not correct; 2 left out that took too long to grade; 1 left out that have nothing to"
    assert both.remarks[0].endswith(f"from 7 answers in {tmp_path}; {reasons} be graded by")
    assert "took too long to grade" in replace(source, least_reward=0.5).tables(LM, is_seven, 100).remarks[0]

    # Where all are kept none is graded.
    asked_for = []
    everything = replace(source, least_reward=float("-inf")).tables(LM, lambda new: asked_for.extend(new) or [], 100)
    assert len(everything.training) == 7 and not asked_for


def test_a_trace_is_followed_in_its_own_blocks_or_larger_ones(tmp_path):
    source = written(tmp_path, [record(10, 20, SLOW)])
    source.require_blocks([4])
    source.require_blocks([4, 8])
    for sizes, smaller in (([2, 4], 2), ([2], 2), ([4, 6], 6)):
        with pytest.raises(DirlError, match=f"line 1 was sampled in blocks of 4, .* in blocks of {smaller}: begin"):
            source.require_blocks(sizes)


def test_columns_of_prompts_may_have_other_names(tmp_path):
    source = generated(tmp_path, completion(0, 0, r"\boxed{7}", task="3+4?", result="7"))
    assert len(tables(source).training) == 0
    assert len(tables(replace(source, columns={"question": "task", "ground_truth_answer": "result"})).training) == 1


ALONE = SimpleNamespace(is_main_process=True)


def test_an_answer_is_graded_once(tmp_path, monkeypatch):
    graded = []
    monkeypatch.setattr("dirl_cli.sft.answer_credits.grade", lambda new: graded.append(len(new)) or [0.5] * len(new))
    attempts = [(Problem("a", "?", "7"), "7"), (Problem("a", "?", "7"), "8"), (Problem("b", "?", "7"), "7")]
    file = tmp_path / "credits.json"
    assert grade_once(attempts[:1], file, ALONE) == [0.5]
    assert grade_once(attempts, file, ALONE) == [0.5, 0.5, 0.5] and graded == [1, 1]  # the last is as the first
    assert len(read_credits(file)) == 2
    grade_once(attempts, None, ALONE)
    assert graded == [1, 1, 2]
    assert grade_once([], tmp_path / "none.json", ALONE) == [] and not (tmp_path / "none.json").exists()
    for damage in ("[", "[1]", '{"a": 2}'):
        file.write_text(damage)
        with pytest.raises(DirlError, match="holds no credits of answers: remove it"):
            grade_once(attempts, file, ALONE)


def test_every_process_has_the_credits_that_the_main_one_gave(tmp_path, monkeypatch):
    def from_the_main_process(credits):
        credits[0] = [0.25]

    monkeypatch.setattr("dirl_cli.sft.answer_credits.broadcast_object_list", from_the_main_process)
    monkeypatch.delattr("dirl_cli.sft.answer_credits.grade")
    file = tmp_path / "credits.json"
    other = SimpleNamespace(is_main_process=False)
    assert grade_once([(Problem("a", "?", "7"), "7")], file, other) == [0.25] and not file.exists()


def test_where_nothing_was_sampled_the_sentence_says_how(tmp_path):
    with pytest.raises(DirlError, match=r"sample answers with `dirl rl rl\.rollout_only=true"):
        answer_files(tmp_path / "nowhere")
    with pytest.raises(DirlError, match="holds no step-"):
        answer_files(tmp_path)
    with pytest.raises(DirlError, match="from which `dirl sft` learns: give a file of texts"):
        SampledAnswers(str(tmp_path)).demonstrations()
