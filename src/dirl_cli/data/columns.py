"""What a row means: its columns under our names, as a demonstration or as a problem.

What is read otherwise than written goes with the row as a note, and so do the columns that nothing is made of.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from dirl_cli.data.conversation import read_turns
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.text import counted
from dirl_cli.types import Problem

TURNS = ("messages", "role", "content")
TEXTS = ("system", "prompt", "response", "question", "ground_truth_answer")
COLUMNS = (*TURNS, *TEXTS, "id", "subset")
ANSWERS = ("response", "ground_truth_answer")  # a row without one is left out, and counted
# What tells where a row comes from or of which kind it is; a nameless column is a table's count of its rows.
LABELS = {"", "id", "idx", "index", "uuid", "source", "data_source", "dataset", "url", "split", "subset", "level"}
EMPTY: tuple[Any, ...] = ("", [], {}, None)  # what says nothing
LONGEST_EXPONENT = 50  # of a number that is spelled out
SHOWN = 60  # characters of an example


def rename_columns(rows: list[Row], columns: Mapping[str, str], setting: str = "data.columns=") -> list[Row]:
    """The rows with their columns under our names. setting: how a user gives `columns`, for a sentence."""
    for ours in columns:
        if ours not in COLUMNS:
            raise DirlError(f"{setting}{{{ours}: {columns[ours]}}}: {did_you_mean(ours, COLUMNS)}")
    found = [rename_row(row, columns) for row in rows]
    return [append_input(row, "question") for row in found] if columns.get("question") == "instruction" else found


def rename_row(row: Row, columns: Mapping[str, str]) -> Row:
    """The row, and the turns of its messages, with the columns under our names."""
    fields, gone = rename_fields(row.fields, columns), displaced(row.fields, columns)
    if isinstance(turns := fields.get("messages"), list):
        gone += [name for turn in turns if isinstance(turn, dict) for name in displaced(turn, columns)]
        fields["messages"] = [rename_fields(turn, columns) if isinstance(turn, dict) else turn for turn in turns]

    said = "`{theirs}` is taken for `{ours}`, and its own `{ours}` is not read"
    notes = [said.format(ours=ours, theirs=columns[ours]) for ours in dict.fromkeys(gone)]
    return row._replace(fields=fields, notes=(*row.notes, *notes))


def rename_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    named = {name: value for name, value in fields.items() if name not in {*columns, *columns.values()}}
    return named | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def displaced(fields: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Our names under which something is written already that gives way to another column."""
    own = [ours for ours in columns if ours not in columns.values() and fields.get(ours) not in EMPTY]
    return [ours for ours in own if columns[ours] in fields]


def append_input(row: Row, question: str) -> Row:
    """The row with Alpaca's `input`, where there is one, on the line below its question."""
    fields = dict(row.fields)
    given, asked = fields.get("input"), fields.get(question)
    if not (isinstance(given, str) and given.strip() and isinstance(asked, str)):
        return row
    fields[question] = f"{asked}\n{fields.pop('input')}"
    return Row(row.location, fields, (*row.notes, "`input` stands on the line below the question"))


def demonstration(row: Row, setting: str = "data.columns=") -> Row:
    """What of a row is learned from: its messages, its prompt and response, or its question and response.

    Of these the first that it has. Prompt and response are taken as written; a question is put to the model as
    elsewhere, through the chat template and with the instruction. `system` comes before messages and question.
    """
    found = recognise_demonstration(row._replace(fields=without_nulls(row.fields)))
    if "messages" in found.fields:
        return with_messages(found, setting)
    expected = "a demonstration has messages, prompt and response, or question and response"
    asked = "prompt" if "prompt" in found.fields else "question"
    optional = ["system"] if asked == "question" and "system" in found.fields else []
    made = {key: text_field(found, key, expected, setting) for key in (asked, "response", *optional)}
    return Row(row.location, made, found.notes, unread_columns(found, {*made, "ground_truth_answer", "answer"}))


def recognise_demonstration(row: Row) -> Row:
    """The row under our names where it is called as in the data sets that most people have."""
    fields = dict(row.fields)
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
    turns, notes = read_turns(row.location, row.fields["messages"])
    if all(turn["role"] != "assistant" for turn in turns):
        raise DirlError(f"{row.location}: messages must be a list of objects, one of them the assistant's")
    read = {"messages"}
    if turns[0]["role"] != "system" and "system" in row.fields:
        turns.insert(0, {"role": "system", "content": text_field(row, "system", "", setting)})
        read, notes = {"messages", "system"}, [*notes, "`system` is the first turn"]
    return Row(row.location, {"messages": turns}, (*row.notes, *notes), unread_columns(row, read))


def question(row: Row, setting: str = "data.columns=") -> Row:
    """What of a row is asked, and what it is graded by: `question`, `ground_truth_answer`, `system`, `id`, `subset`."""
    found = recognise_problem(row._replace(fields=without_nulls(row.fields)))
    expected = "a problem has question and ground_truth_answer"
    optional = ["system"] if "system" in found.fields else []
    made = {key: text_field(found, key, expected, setting) for key in ("question", "ground_truth_answer", *optional)}
    labels = {key: str(found.fields[key]) for key in ("id", "subset") if key in found.fields}
    return Row(row.location, made | labels, found.notes, unread_columns(found, {*made, "response", "solution"}))


def recognise_problem(row: Row) -> Row:
    """The row under our names where it is called as in the data sets that most people have."""
    fields = dict(row.fields)
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
    return {"question", "ground_truth_answer"} <= recognise_problem(
        row._replace(fields=without_nulls(row.fields))
    ).fields.keys()


def one_question(place: str, chat: list) -> dict[str, str]:
    """The question of a chat that asks one, and the system turn before it if there is one."""
    turns, _ = read_turns(place, chat)
    roles = [turn["role"] for turn in turns]
    if roles not in (["user"], ["system", "user"]):
        raise DirlError(f"{place}: a problem is one question, not a chat of {', '.join(roles)}: leave the row out")
    asked = {"question": turns[-1]["content"]}
    return asked if len(turns) == 1 else {**asked, "system": turns[0]["content"]}


def single(answer: Any) -> Any:
    """The one text in a list of one, which may itself be spelled as JSON."""
    if isinstance(answer, str) and answer.startswith('["'):
        try:
            answer = json.loads(answer)
        except ValueError:
            return answer
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def problem(row: Row, default_id: str, setting: str = "data.columns=") -> Problem:
    fields = question(row, setting).fields
    return Problem(
        id=fields.get("id", default_id),
        question=fields["question"],
        answer=fields["ground_truth_answer"],
        subset=fields.get("subset", ""),
        system=fields.get("system", ""),
    )


def text_field(row: Row, key: str, expected: str, setting: str = "data.columns=") -> str:
    """The field as text; a number is fine, and an answer that is not there is empty."""
    value = row.fields.get(key)
    if key not in row.fields:
        theirs = ", ".join(row.fields)
        hint = f"; map yours ({theirs}) with '{setting}{{{key}: …}}'" if theirs else ""
        raise DirlError(f"{row.location} has no {key}: {expected}{hint}")
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
    """The fields without those that hold nothing: tables say null or NaN for what is absent. Answers stay."""
    found = {name: None if isinstance(value, float) and value != value else value for name, value in fields.items()}
    return {name: value for name, value in found.items() if value is not None or name in (*ANSWERS, "answer", "output")}


def with_note(row: Row, fields: dict[str, Any], note: str) -> Row:
    return row._replace(fields=fields, notes=(*row.notes, note))


def unread_columns(row: Row, read: set[str]) -> dict[str, Any]:
    """The columns that say something, and of which nothing is made."""
    known = read | LABELS
    return {name: value for name, value in row.fields.items() if name not in known and value not in EMPTY}


def summarize_notes(rows: Iterable[Row]) -> list[str]:
    """A line for each kind of note, with how many rows it is about and the first of them; one for what is not read."""
    noted_in, unread_in = Counter[str](), Counter[str]()
    first, example = dict[str, str](), ""
    for row in rows:
        for note in row.notes:
            noted_in[note] += 1
            first.setdefault(note, row.location)
        for name, value in row.unread.items():
            unread_in[name] += 1
            if not example:
                shown = json.dumps(value, default=str, ensure_ascii=False)[:SHOWN]
                example = f"{row.location} has {name}: {shown}"
    lines = [f"{counted(n, 'row')}: {note} (first {first[note]})" for note, n in noted_in.items()]
    if unread_in:
        columns = ", ".join(f"{name} ({counted(n, 'row')})" for name, n in unread_in.items())
        lines.append(f"not read: {columns}; {example}")
    return lines
