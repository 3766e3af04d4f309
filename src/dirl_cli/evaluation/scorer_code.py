"""Scorers of the user's own are code that may change: answers that another version graded are graded anew."""

import json
from collections.abc import Sequence
from pathlib import Path

from dirl_cli.evaluation.answers import AnswerLog, read_answers
from dirl_cli.evaluation.predictions import regraded
from dirl_cli.evaluation.result_card import ANSWERS, SOURCE
from dirl_cli.files import write_json
from dirl_cli.reward.custom_scorer import scorer_digest
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.grading import Grader
from dirl_cli.types import Problem


def digests_by_scorer(problems: Sequence[Problem]) -> dict[str, str]:
    """A digest of the file of each scorer that problems name, by its import path."""
    names = {problem.verifier for problem in problems if is_import_path(problem.verifier)}
    return {name: scorer_digest(name) for name in sorted(names)}


def regrade_changed(out: Path, problems: Sequence[Problem], grader: Grader) -> int:
    """Grade the answers in `out` anew to problems whose scorer is in another file than when they were graded.

    So are those of which it is not noted what graded them, as earlier versions did not.

    Their lines are appended, as the last of a sample counts. What graded each problem is noted afterwards, so that an
    interruption leaves nothing half done. Returns how many answers there were.
    """
    digests = digests_by_scorer(problems)
    if not digests:
        return 0
    source = json.loads((out / SOURCE).read_text())
    before = source.get("scorers", {})
    now = {problem.id: digests[problem.verifier] for problem in problems if problem.verifier in digests}
    changed = {problem_id for problem_id, digest in now.items() if before.get(problem_id) != digest}

    answers = [answer for answer in read_answers(out / ANSWERS) if answer.problem in changed]
    if answers:
        with AnswerLog(out / ANSWERS) as log:
            for answer in regraded(answers, problems, grader):
                log.append(answer)
    write_json(out / SOURCE, {**source, "scorers": before | now})
    return len(answers)
