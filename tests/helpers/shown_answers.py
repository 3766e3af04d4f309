"""Answers written by hand, in the files that `dirl view` reads."""

import json
from itertools import pairwise
from pathlib import Path

from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.rollout.storage import Record, rollout_path, trajectory_columns, write_rollout
from dirl_cli.types import Problem, Trajectory

WORDS = {1: "two", 2: " plus", 3: " two", 4: "=", 5: "four", 6: "five", 9: "<end>", 10: "\n"}


class Words:
    """A tokenizer of a few words; 7 and 8 are the halves of a letter, and all others have no text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        text = "".join("€" if pair == (7, 8) else "" for pair in pairwise(token_ids))
        if text:
            return text
        return "".join("\ufffd" if token in (7, 8) else WORDS.get(token, "") for token in token_ids)


def trajectory(token_ids: list[int], reveal_step: list[int], prompt: int = 5) -> Trajectory:
    """An answer in blocks of 4 that 9 ends; the probability of every token is a half."""
    return Trajectory(
        [1] * prompt, token_ids, reveal_step, [-0.6931472] * len(token_ids), "stop", 3, 3, 0, (9,), block_size=4
    )


FOUR = trajectory([5, 9, 9], [2, 1, 1])
FIVE = trajectory([6, 4, 5, 10, 6, 9, 9], [1, 1, 2, 1, 1, 2, 2])
ASKED = Problem("sum-1", "two plus two?", "four", "")


def record(answer: Trajectory, sample: int, problem: Problem = ASKED, **facts: object) -> Record:
    text = Words().decode(answer.completion_ids)
    return Record(problem, sample, text, answer, **facts)


def run_of(directory: Path, steps: int = 2) -> Path:
    """A run whose steps have a right and a wrong answer to one problem each, the last to that of the first."""
    for step in range(1, steps + 1):
        problem = Problem(f"sum-{step % steps or steps}", "two plus two?", "four")
        if step == steps:
            problem = Problem("sum-1", "two plus two?", "four")
        right = record(FOUR, 0, problem, reward=1.0, correct=True, advantage=1.0, learned_from=True)
        wrong = record(FIVE, 1, problem, reward=0.0, advantage=-1.0, learned_from=True)
        write_rollout(rollout_path(directory / "rollouts", step), [right, wrong])
    return directory


def completions_of(directory: Path, question: str = "two plus two?", answers: tuple[Trajectory, ...] = (FOUR,)) -> Path:
    """What `dirl generate` leaves of a question."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample, answer in enumerate(answers):
        fields = trajectory_columns(answer)
        text = Words().decode(answer.completion_ids)
        lines.append(json.dumps({"question": question, "index": 0, "sample": sample, "text": text, **fields}) + "\n")
    (directory / "completions.jsonl").write_text("".join(lines))
    return directory


def evaluation_of(directory: Path, text: str = "four", question: str = "two plus two?") -> Path:
    """The answers of an evaluation of one problem."""
    directory.mkdir(parents=True, exist_ok=True)
    answer = GradedAnswer("sum-1", 0, text, True, "stop", 1, 3, 2, 2, 0.5, question, "four", "four", 1.0)
    (directory / "answers.jsonl").write_text(json.dumps(vars(answer)) + "\n")
    return directory
