"""From trajectories to graded answers, while more are being sampled."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from dirl_cli.evaluation.answers import Answer
from dirl_cli.reward.boxed import final_answer, reference
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem, Trajectory


def graded(
    sampled: Iterable[tuple[int, int, Trajectory]],
    problems: Sequence[Problem],
    decode: Callable[[list[int]], str],
    grader: Grader,
) -> Iterator[Answer]:
    """Grade (problem index, sample index, trajectory) as they come; yields answers as their verdicts are reached.

    An answer that ran into the length limit is not correct, whatever it holds, as in training.
    """
    waiting: dict[object, Answer] = {}
    before = time.perf_counter()
    for index, sample, trajectory in sampled:
        now = time.perf_counter()
        problem, text = problems[index], decode(trajectory.completion_ids)
        answer = Answer(
            problem=problem.id,
            sample=sample,
            text=text,
            correct=False,
            stop_reason=trajectory.stop_reason,
            length=len(trajectory.completion_ids),
            tokens=len(trajectory.token_ids),
            denoise_forwards=trajectory.denoise_forwards,
            forwards=trajectory.forwards,
            seconds=now - before,
        )
        waiting[index, sample] = explained(answer, problem)
        grader.submit((index, sample), problem.answer, text)
        yield from (verdict(waiting.pop(key), correct) for key, correct in grader.finished())
        before = now
    yield from (verdict(waiting.pop(key), correct) for key, correct in grader.rest())


def explained(answer: Answer, problem: Problem) -> Answer:
    """The answer with what it takes to see why it is right or wrong."""
    found = final_answer(answer.text)
    return replace(answer, question=problem.question, reference=reference(problem.answer), extracted=found)


def verdict(answer: Answer, correct: bool) -> Answer:
    return replace(answer, correct=correct and answer.stop_reason == "stop")
