"""Read a row as a demonstration or as a problem: its columns under our names, in the layouts that most data sets have.

What is read otherwise than written goes with the row as a note, and so do the columns that nothing is made of.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from math import isnan
from typing import Any

from dirl_cli.data.code_rows import CODE, has_tests, recognise_code
from dirl_cli.data.conversation import read_turns, says_something
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.text import counted
from dirl_cli.types import Problem

TURNS = ("messages", "role", "content")
PAIR = ("chosen", "rejected")
TEXTS = ("system", "prompt", "response", "question", "ground_truth_answer", *PAIR)
COLUMNS = (*TURNS, *TEXTS, *CODE, "id", "subset")
ANSWERS = ("response", "ground_truth_answer", *PAIR)  # a row without one is left out, and counted
# Columns that say where a row comes from or of which kind it is; a nameless one is a table's count of its rows.
LABELS = {"", "id", "idx", "index", "uuid", "source", "data_source", "dataset", "url", "split", "subset", "level"}
EMPTY: tuple[Any, ...] = ("", [], {}, None)  # what says nothing
LONGEST_EXPONENT = 50  # of a number that is spelled out
SHOWN = 60  # characters of an example
VERIFYING = ("verifier", "options", "aliases", "details")  # how a row is graded (data/verified_rows.py)


def rename_columns(rows: list[Row], columns: Mapping[str, str], setting: str = "data.columns=") -> list[Row]:
    """The rows with their columns under our names.

    columns: the file's name of each, by ours. setting: how a user gives `columns`, for a sentence.
    Raises DirlError for a name that is none of ours.
    """
    for new in columns:
        if new not in (*COLUMNS, *VERIFYING):
            raise DirlError(f"{setting}{{{new}: {columns[new]}}}: {did_you_mean(new, (*COLUMNS, *VERIFYING))}")
    renamed = [rename_row(row, columns) for row in rows]
    if columns.get("question") == "instruction":  # Alpaca's rows, whose `input` belongs to the question
        renamed = [append_input(row, "question") for row in renamed]
    return renamed


def rename_row(row: Row, columns: Mapping[str, str]) -> Row:
    """The row, and the turns of its messages, with the columns under our names."""
    fields = rename_fields(row.fields, columns)
    overwritten = overwritten_columns(row.fields, columns)

    # `role` and `content` are columns of a turn, wherever the turns stand.
    for name in ("messages", "prompt", "question", *PAIR):
        turns = fields.get(name)
        if not isinstance(turns, list):
            continue
        fields[name] = list(turns)  # the row keeps its own
        for i, turn in enumerate(turns):
            if isinstance(turn, dict):
                overwritten += overwritten_columns(turn, columns)
                fields[name][i] = rename_fields(turn, columns)

    notes = list(row.notes)
    for name in dict.fromkeys(overwritten):  # once, though all turns may have it
        notes.append(f"`{columns[name]}` is taken for `{name}`, and its own `{name}` is not read")
    return row._replace(fields=fields, notes=tuple(notes))


def rename_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields with those that `columns` names under our names, the others as they are."""
    mapped = {*columns, *columns.values()}
    renamed = {name: value for name, value in fields.items() if name not in mapped}
    for new, old in columns.items():
        if old in fields:
            renamed[new] = fields[old]
    return renamed


def overwritten_columns(fields: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Our names under which the fields hold something already, which another column replaces."""
    names = []
    for new, old in columns.items():
        is_read_as_another = new in columns.values()
        if not is_read_as_another and fields.get(new) not in EMPTY and old in fields:
            names.append(new)
    return names


def append_input(row: Row, question: str) -> Row:
    """The row with Alpaca's `input`, where there is one, on the line below its question.

    question: the name of the column that holds it.
    """
    fields = dict(row.fields)
    extra = fields.get("input")
    text = fields.get(question)
    if not (isinstance(extra, str) and extra.strip() and isinstance(text, str)):
        return row
    fields[question] = f"{text}\n{fields.pop('input')}"
    return Row(row.location, fields, (*row.notes, "`input` stands on the line below the question"))


def demonstration(row: Row, setting: str = "data.columns=") -> Row:
    """What of a row is learned from: its messages, its prompt and response, or its question and response.

    Of these the first that it has. Prompt and response are taken as written; a question is put to the model as
    elsewhere, through the chat template and with the instruction. `system` comes before messages and question.
    Raises DirlError where the row has none of them, or what is no text.
    """
    row = recognise_demonstration(row._replace(fields=without_nulls(row.fields)))
    if "messages" in row.fields:
        return with_messages(row, setting)

    expected = "a demonstration has messages, prompt and response, or question and response"
    keys = ["prompt", "response"] if "prompt" in row.fields else ["question", "response"]
    if "prompt" not in row.fields and "system" in row.fields:
        keys.append("system")
    fields = {key: text_field(row, key, expected, setting) for key in keys}
    return Row(row.location, fields, row.notes, unread_columns(row, {*fields, *CODE, "ground_truth_answer", "answer"}))


def recognise_demonstration(row: Row) -> Row:
    """The row under our names where it has the columns of ShareGPT, Alpaca or GSM8K; any other as it is."""
    fields = dict(row.fields)
    # Our own columns win: a row that has them is not looked at further.
    if "messages" in fields or fields.get("response") is not None:
        return row
    if isinstance(fields.get("conversations"), list):
        fields["messages"] = fields.pop("conversations")
        return with_note(row, fields, "`conversations` are the messages, as in ShareGPT's rows")
    if isinstance(fields.get("instruction"), str) and "output" in fields:
        row = append_input(row, "instruction")
        fields = dict(row.fields)
        fields |= {"question": fields.pop("instruction"), "response": fields.pop("output")}
        return with_note(row, fields, "`instruction` is the question and `output` the response, as in Alpaca's rows")
    if "question" in fields and "####" in str(fields.get("answer", "")):
        fields["response"] = fields.pop("answer")
        return with_note(row, fields, "`answer` is the response, down to its ####, as in GSM8K's rows")
    return row


def with_messages(row: Row, setting: str) -> Row:
    """The demonstration of a row that is a conversation, with its `system` as the first turn if there is none yet."""
    turns, notes = read_turns(row.location, row.fields["messages"])
    if all(turn["role"] != "assistant" for turn in turns):
        raise DirlError(f"{row.location}: messages must be a list of objects, one of them the assistant's")
    read = {"messages"}
    if turns[0]["role"] != "system" and "system" in row.fields:
        turns.insert(0, {"role": "system", "content": text_field(row, "system", "", setting)})
        read.add("system")
        notes.append("`system` is the first turn")
    return Row(row.location, {"messages": turns}, (*row.notes, *notes), unread_columns(row, read))


def pair(row: Row, setting: str = "data.columns=") -> tuple[Row, Row]:
    """The demonstrations of a row's `chosen` and of its `rejected` answer.

    Both answer its prompt, taken as written, or its question, put as elsewhere; `system` comes before the question.
    Where they are lists of turns they are conversations, or what follows the prompt or question, itself turns or text.
    Raises DirlError where one of them is missing, is no text, or answers something else than the other, or nothing.
    """
    fields = without_nulls(row.fields)
    for key in PAIR:
        if key not in fields:
            text_field(row, key, "a pair has chosen and rejected, and a prompt or question before them", setting)
    before = {name: value for name, value in fields.items() if name not in (*PAIR, "response", "messages")}
    asked = before.get("prompt", before.get("question"))
    if any(isinstance(value, list) for value in (asked, *(fields[key] for key in PAIR))):
        chosen, rejected = (with_messages(pair_messages(row, before, fields[key], setting), setting) for key in PAIR)
        require_same_turns(chosen, rejected, setting)
        return chosen, rejected
    chosen, rejected = (
        demonstration(row._replace(fields={**before, "response": fields[key]}), setting) for key in PAIR
    )
    return chosen, rejected


def pair_messages(row: Row, before: Mapping[str, Any], answer: Any, setting: str) -> Row:
    """The row with the conversation that ends in one answer of its pair as its messages.

    before: the row's other columns. answer: turns, the last of which is the answer, or its text alone. setting: how a
    user gives `columns`.
    """
    fields = dict(before)
    asked = "prompt" if "prompt" in fields else "question"
    turns = fields.pop(asked, [])
    notes = row.notes
    if not isinstance(turns, list):  # UltraFeedback has the question as text, and again as the first turn
        text = text_field(row._replace(fields=dict(before)), asked, "", setting)
        is_repeated = isinstance(answer, list) and len(answer) > 1
        notes = (*notes, f"`{asked}` is the first user turn") if not is_repeated else notes
        turns = [] if is_repeated else [{"role": "user", "content": text}]
    answer_turns = answer if isinstance(answer, list) and answer else [{"role": "assistant", "content": answer or ""}]
    return row._replace(fields={**fields, "messages": [*turns, *answer_turns]}, notes=notes)


def require_same_turns(chosen: Row, rejected: Row, setting: str) -> None:
    """Raises DirlError unless both conversations ask something, are the same up to the last turn, and that answers.

    A pair with an empty answer passes, since that is left out and counted. setting: how a user gives `columns`.
    """
    last = [row.fields["messages"][-1] for row in (chosen, rejected)]
    if any(turn["role"] != "assistant" for turn in last):
        raise DirlError(f"{chosen.location}: chosen and rejected must each end in the assistant's turn: leave it out")
    if not all(map(says_something, last)):
        return
    if chosen.fields["messages"][:-1] != rejected.fields["messages"][:-1]:
        raise DirlError(
            f"{chosen.location}: chosen and rejected must be the same conversation but for its last turn:"
            " leave the row out"
        )
    if all(turn["role"] != "user" for turn in chosen.fields["messages"][:-1]):
        raise DirlError(
            f"{chosen.location} has no turn of the user before chosen and rejected: give a prompt or question, under"
            f" its own name with '{setting}{{question: …}}', or leave the row out"
        )


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


def worked_solution(row: Row, answer: str) -> str:
    """The text of a row's `response` or `solution`, or of an answer that is one down to its ####; "" without any."""
    for name in ("response", "solution"):
        text = row.fields.get(name)
        if isinstance(text, str) and text.strip():
            return text
    working, mark, _ = answer.partition("####")
    return working.rstrip() if mark else ""


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
    if isinstance(rule := fields.get("reward_model"), dict) and "ground_truth" in rule:
        fields["ground_truth_answer"] = single(rule["ground_truth"])
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


def single(answer: Any) -> Any:
    """The one text in a list of one, which may itself be spelled as JSON."""
    if isinstance(answer, str) and answer.startswith('["'):
        try:
            answer = json.loads(answer)
        except ValueError:
            return answer
    if isinstance(answer, list) and len(answer) == 1:
        return answer[0]
    return answer


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


def text_field(row: Row, key: str, expected: str, setting: str = "data.columns=") -> str:
    """The field as text, a number by its digits; an answer that is null is "".

    expected: what a row should have, for the error. setting: how a user gives `columns`.
    Raises DirlError where it is missing or neither text nor a number.
    """
    value = row.fields.get(key)
    if key not in row.fields:
        sentence = f"{row.location} has no {key}: {expected}"
        if columns := ", ".join(row.fields):
            sentence += f"; map yours ({columns}) with '{setting}{{{key}: …}}'"
        raise DirlError(sentence)
    if value is None and key in ANSWERS:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise DirlError(f"{row.location}: {key} must be text, not {json.dumps(value, default=str)[:40]}")
    return format_number(value)


def format_number(value: str | int | float | Decimal) -> str:
    """A number by its digits, 0.00001 and not 1e-05; text as it is."""
    digits = str(value)
    if isinstance(value, float | Decimal) and "e" in digits.lower():
        number = Decimal(digits)
        return f"{number:f}" if abs(number.adjusted()) <= LONGEST_EXPONENT else digits
    return digits


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that hold nothing: tables say null or NaN for what is absent. Answers stay, as null."""
    values = {}
    for name, value in fields.items():
        is_absent = value is None or (isinstance(value, float) and isnan(value))
        if not is_absent:
            values[name] = value
        elif name in (*ANSWERS, "answer", "output"):
            values[name] = None
    return values


def with_note(row: Row, fields: dict[str, Any], note: str) -> Row:
    """The row with other fields, and a note of how they were read."""
    return row._replace(fields=fields, notes=(*row.notes, note))


def unread_columns(row: Row, read: set[str]) -> dict[str, Any]:
    """The columns that say something and of which nothing is made. read: those that are used."""
    known = read | LABELS
    return {name: value for name, value in row.fields.items() if name not in known and value not in EMPTY}


def summarize_notes(rows: Iterable[Row]) -> list[str]:
    """A line for each kind of note, with how many rows it is about and the first of them; one for what is not read."""
    note_counts = Counter[str]()
    first = dict[str, str]()  # where each note stands first
    unread_counts = Counter[str]()
    example = ""
    for row in rows:
        for note in row.notes:
            note_counts[note] += 1
            first.setdefault(note, row.location)
        for name, value in row.unread.items():
            unread_counts[name] += 1
            if not example:
                excerpt = json.dumps(value, default=str, ensure_ascii=False)[:SHOWN]
                example = f"{row.location} has {name}: {excerpt}"

    lines = [f"{counted(n, 'row')}: {note} (first {first[note]})" for note, n in note_counts.items()]
    if unread_counts:
        columns = [f"{name} ({counted(n, 'row')})" for name, n in unread_counts.items()]
        lines.append(f"not read: {', '.join(columns)}; {example}")
    return lines
