"""Read a row as a problem: what is asked, what answers are graded by, and what hints are taken from.

The layouts are those that most data sets have: a question and its answer, chats, verl's rows, and tests of programs.
"""

import json
from typing import Any

from dirl_cli.data.code_rows import CODE, has_tests, recognise_code
from dirl_cli.data.columns import text_field, unread_columns, with_note, without_nulls
from dirl_cli.data.conversation import read_turns
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.types import Problem


def question(row: Row, setting: str = "data.columns=") -> Row:
    """What of a row is asked, and what it is graded by: `question`, `ground_truth_answer`, `system`, `id`, `subset`.

    And what hints are taken from, where there is any: `solution`. A problem that a program solves has `tests` to be
    graded by, perhaps with `setup`, `beginning` and `prelude` (data/code_rows.py), and no answer beside its solution.

    Raises DirlError where the row has no question or no answer to grade by, or what is no text.
    """
    row = recognise_problem(recognise_code(row._replace(fields=without_nulls(row.fields))))
    expected = "a problem has question and ground_truth_answer, or question and tests"
    keys = ["question"]
    if not has_tests(row.fields):
        keys.append("ground_truth_answer")
    if "system" in row.fields:
        keys.append("system")

    fields: dict[str, Any] = {key: text_field(row, key, expected, setting) for key in keys}
    for key in ("id", "subset"):
        if key in row.fields:
            fields[key] = str(row.fields[key])
    if solution := worked_solution(row, fields.get("ground_truth_answer", "")):
        fields["solution"] = solution
    if has_tests(row.fields):
        fields |= {key: row.fields[key] for key in CODE if key in row.fields}
    return Row(row.location, fields, row.notes, unread_columns(row, {*fields, "response", "solution"}))


def problem(row: Row, default_id: str, setting: str = "data.columns=") -> Problem:
    """A row as a problem. default_id: its id where the row has none. Raises DirlError as `question` does."""
    fields = question(row, setting).fields
    solution = fields.get("solution", "")
    details = {key: fields[key] for key in CODE if key in fields}
    return Problem(
        id=fields.get("id", default_id),
        question=fields["question"],
        answer=solution if details else fields["ground_truth_answer"],
        subset=fields.get("subset", ""),
        system=fields.get("system", ""),
        solution=solution,
        verifier="code" if details else "math",
        details=details,
    )


def recognise_problem(row: Row) -> Row:
    """The row under our names where it has a chat for its question, or verl's or a plain column for its answer."""
    fields = dict(row.fields)
    # The question first, which may be in either layout; then the answer, in whichever column it stands.
    chat = fields.get("question", fields.get("prompt"))
    if isinstance(chat, list) and all(isinstance(turn, dict) for turn in chat):
        fields |= one_question(row.location, chat)
        fields.pop("prompt", None)
        row = with_note(row, fields, "the prompt is a chat, whose text is the question")
    if "ground_truth_answer" in fields or "question" not in fields:
        return row

    reward_model = fields.get("reward_model")
    if isinstance(reward_model, dict) and "ground_truth" in reward_model:
        fields["ground_truth_answer"] = only_answer(reward_model["ground_truth"])
        for name in ("reward_model", "extra_info", "ability"):
            fields.pop(name, None)
        return with_note(row, fields, "`reward_model.ground_truth` is the reference answer, as in verl's rows")
    if "answer" in fields:
        fields["ground_truth_answer"] = fields.pop("answer")
        return with_note(row, fields, "`answer` is the reference answer")
    return row


def is_problem(row: Row) -> bool:
    """Whether there is a question with a reference answer in it, under whatever names."""
    row = recognise_code(row._replace(fields=without_nulls(row.fields)))
    if not {"ground_truth_answer", "reward_model", "answer", "tests"} & row.fields.keys():
        return False  # its prompt may be of many turns, as that of a pair

    names = recognise_problem(row).fields.keys()
    return "question" in names and not names.isdisjoint({"ground_truth_answer", "tests"})


def one_question(location: str, chat: list) -> dict[str, str]:
    """The question of a chat that asks one, and the system turn before it if there is one."""
    turns, _ = read_turns(location, chat)
    roles = [turn["role"] for turn in turns]
    if roles not in (["user"], ["system", "user"]):
        raise DirlError(f"{location}: a problem is one question, not a chat of {', '.join(roles)}: leave the row out")
    fields = {"question": turns[-1]["content"]}
    if len(turns) == 2:
        fields["system"] = turns[0]["content"]
    return fields


def only_answer(answers: Any) -> Any:
    """The answer in a list of one, which may itself be spelled as JSON; anything else as it is."""
    if isinstance(answers, str) and answers.startswith('["'):
        try:
            answers = json.loads(answers)
        except ValueError:
            return answers
    if isinstance(answers, list) and len(answers) == 1:
        return answers[0]
    return answers


def worked_solution(row: Row, answer: str) -> str:
    """The text of a row's `response` or `solution`, or of an answer that is one down to its ####; "" without any."""
    for name in ("response", "solution"):
        solution = row.fields.get(name)
        if isinstance(solution, str) and solution.strip():
            return solution
    working, mark, _ = answer.partition("####")
    return working.rstrip() if mark else ""
