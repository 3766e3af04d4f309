"""From trajectories to graded answers, while more are being sampled."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dirl_cli.console import working
from dirl_cli.evaluation.answers import GradedAnswer
from dirl_cli.reward.boxed import reference
from dirl_cli.reward.grading import Grader
from dirl_cli.reward.verifiers import verifier_of
from dirl_cli.types import Problem, Trajectory


def graded(
    sampled: Iterable[tuple[int, int, Trajectory]],
    problems: Sequence[Problem],
    decode: Callable[[list[int]], str],
    grader: Grader,
) -> Iterator[GradedAnswer]:
    """Grade (problem index, sample index, trajectory) as they come; yields answers as their verdicts are reached.

    An answer that ran into the length limit is not correct, whatever it holds, as in training.
    """
    ungraded: dict[object, GradedAnswer] = {}
    before = time.perf_counter()
    for index, sample, trajectory in sampled:
        now = time.perf_counter()
        problem = problems[index]
        text = decode(trajectory.completion_ids)
        answer = GradedAnswer(
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
        ungraded[index, sample] = explained(answer, problem)

        # Other processes grade: verdicts of earlier answers are taken as they are there, none is waited for.
        grader.submit((index, sample), problem, text)
        for key, credit in grader.finished():
            yield with_credit(ungraded.pop(key), credit)
        before = now

    for key, credit in grader.rest():
        yield with_credit(ungraded.pop(key), credit)


def explained(answer: GradedAnswer, problem: Problem) -> GradedAnswer:
    """The answer with its question, its reference and the final answer in it."""
    return replace(
        answer,
        question=problem.question,
        reference=reference(problem.answer),
        extracted=verifier_of(problem).extract(answer.text),
    )


def with_credit(answer: GradedAnswer, credit: float) -> GradedAnswer:
    """The answer graded: what does not stop has no credit; correct is what has all of it."""
    if answer.stop_reason != "stop":
        credit = 0.0
    return replace(answer, correct=credit == 1, credit=credit)


def tracked(
    answers: Iterable[GradedAnswer], earlier: Iterable[GradedAnswer], total: int, console: Console, processes: int = 1
) -> Iterator[GradedAnswer]:
    """The answers, with accuracy so far (`earlier` ones included), tokens/s and time left shown as they pass.

    total: of this one of `processes`, which is told where it is not the only one.
    """
    # On a terminal a bar moves; a log gets a line for each tenth, and signs of life in between.
    live = console.is_terminal and not console.quiet
    columns = [BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}")]
    columns += [TimeRemainingColumn(compact=True), TextColumn("left")]
    bar = Progress(*columns, console=console, transient=True, disable=not live)
    signs_of_life = nullcontext(lambda done, printed: None) if live else working(console, "answering", total)

    # The accuracy is over all answers, the speed over this start's: the tokens of earlier ones took no time now.
    earlier = list(earlier)
    done = len(earlier)
    right = sum(answer.correct for answer in earlier)
    tokens = 0
    whose = f" · process 1 of {processes}" if processes > 1 else ""
    started = time.perf_counter()
    with bar, signs_of_life as count:
        task = bar.add_task("", total=total, completed=done)
        for answer in answers:
            done += 1
            right += answer.correct
            tokens += answer.tokens
            seconds = time.perf_counter() - started
            speed = f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{done / seconds:,.0f} answers/s"
            text = f"accuracy {100 * right / done:.1f} · {speed}{whose}"
            bar.update(task, completed=done, description=text)
            is_tenth = not live and 10 * done // total > 10 * (done - 1) // total
            count(done, printed=is_tenth)
            if is_tenth:
                console.print(f"{done}/{total} answers · {text}", markup=False, highlight=False)
            yield answer
