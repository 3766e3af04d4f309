"""Read a row as a demonstration, or as a pair of them: what is asked, and what is answered.

The layouts are those that most data sets have: chats, ShareGPT's, Alpaca's and GSM8K's rows, and pairs of preferences.
"""

from typing import Any

from dirl_cli.data.code_rows import CODE
from dirl_cli.data.columns import PAIR, append_input, text_field, unread_columns, with_note, without_nulls
from dirl_cli.data.conversation import read_turns, says_something
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError


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
    answers = [fields[key] for key in PAIR]
    context = row._replace(
        fields={name: field for name, field in fields.items() if name not in (*PAIR, "response", "messages")}
    )

    prompt = context.fields.get("prompt", context.fields.get("question"))
    if any(isinstance(text_or_turns, list) for text_or_turns in (prompt, *answers)):
        chosen, rejected = (with_messages(answered_by_turns(context, answer, setting), setting) for answer in answers)
        require_same_turns(chosen, rejected, setting)
    else:
        chosen, rejected = (
            demonstration(context._replace(fields={**context.fields, "response": answer}), setting)
            for answer in answers
        )
    return chosen, rejected


def answered_by_turns(context: Row, answer: Any, setting: str) -> Row:
    """The row with the conversation that ends in one answer of its pair as its messages.

    context: the row without its answers. answer: turns, the last of which is the answer, or its text alone. setting:
    how a user gives `columns`.
    """
    fields = dict(context.fields)
    prompt_key = "prompt" if "prompt" in fields else "question"
    turns = fields.pop(prompt_key, [])
    notes = context.notes
    if not isinstance(turns, list):  # UltraFeedback has the question as text, and again as the first turn
        prompt = text_field(context, prompt_key, "", setting)
        is_repeated = isinstance(answer, list) and len(answer) > 1
        notes = (*notes, f"`{prompt_key}` is the first user turn") if not is_repeated else notes
        turns = [] if is_repeated else [{"role": "user", "content": prompt}]
    answer_turns = answer if isinstance(answer, list) and answer else [{"role": "assistant", "content": answer or ""}]
    return context._replace(fields={**fields, "messages": [*turns, *answer_turns]}, notes=notes)


def require_same_turns(chosen: Row, rejected: Row, setting: str) -> None:
    """Raises DirlError unless both conversations ask something, are the same up to the last turn, and that answers.

    A pair with an empty answer passes, since that is left out and counted. setting: how a user gives `columns`.
    """
    *chosen_context, chosen_answer = chosen.fields["messages"]
    *rejected_context, rejected_answer = rejected.fields["messages"]
    if any(turn["role"] != "assistant" for turn in (chosen_answer, rejected_answer)):
        raise DirlError(f"{chosen.location}: chosen and rejected must each end in the assistant's turn: leave it out")
    if not says_something(chosen_answer) or not says_something(rejected_answer):
        return
    if chosen_context != rejected_context:
        raise DirlError(
            f"{chosen.location}: chosen and rejected must be the same conversation but for its last turn:"
            " leave the row out"
        )
    if all(turn["role"] != "user" for turn in chosen_context):
        raise DirlError(
            f"{chosen.location} has no turn of the user before chosen and rejected: give a prompt or question, under"
            f" its own name with '{setting}{{question: …}}', or leave the row out"
        )
