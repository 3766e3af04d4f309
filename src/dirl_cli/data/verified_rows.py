"""Read from a row how its answers are verified: its `verifier`, and the options, aliases or columns that this needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dirl_cli.data.columns import VERIFYING, without_nulls
from dirl_cli.data.problem_rows import is_problem, problem, question, recognise_problem
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError, did_you_mean
from dirl_cli.reward.choices import LETTERS
from dirl_cli.reward.custom_scorer import find_scorer
from dirl_cli.reward.functions import is_import_path
from dirl_cli.reward.verifiers import VERIFIERS
from dirl_cli.types import Problem


def name_verifiers(rows: Sequence[Row], verifier: str | None, scorers: Sequence[str], setting: str) -> list[Row]:
    """The rows, each with a `verifier` where it names one or the config does.

    verifier: of rows that name none. scorers: import paths that rows may name: a file of data runs no code by itself.
    setting: how a user gives `columns`, for a sentence. Raises DirlError for a name that is neither built in nor these.
    """
    allowed = {*scorers, verifier} - {None}
    for name in allowed:
        if is_import_path(str(name)):
            find_scorer(str(name))  # here, and not when the first answer is there
        elif name not in VERIFIERS:
            raise DirlError(f"{spelled(setting, 'verifier')}{name}: {did_you_mean(str(name), VERIFIERS)}")

    named = []
    for row in rows:
        name = row.fields.get("verifier") or verifier
        if name is None:
            named.append(row)
            continue
        if not isinstance(name, str) or not (is_import_path(name) or name in VERIFIERS):
            hint = did_you_mean(str(name), VERIFIERS)
            raise DirlError(f"{row.location}: no verifier is called {str(name)[:40]}: {hint}")
        if is_import_path(name) and name not in allowed:
            remedy = f"{spelled(setting, 'scorers')}[{name}]"
            raise DirlError(f"{row.location} names the code {name}: where you trust it, let it run with {remedy}")
        named.append(row._replace(fields={**row.fields, "verifier": name}))
    return named


def spelled(setting: str, key: str) -> str:
    """How a user gives a key beside `columns`. setting: how that one is given."""
    return setting.replace("columns", key)


def verified_question(row: Row, setting: str) -> Row:
    """As `problem_rows.question`, with how the row's answers are verified as `verifier` and `details`, if it says so.

    Raises DirlError as that does, and for options, aliases or details that are none.
    """
    if row.fields.get("verifier") is None:
        return question(row, setting)
    prepared = with_details(recognise_problem(row._replace(fields=without_nulls(row.fields))))
    read = question(prepared, setting)
    verification = {key: prepared.fields[key] for key in ("verifier", "details") if key in prepared.fields}
    unread = {}
    if not is_import_path(verification["verifier"]):  # which is given all columns
        unread = {name: value for name, value in read.unread.items() if name not in VERIFYING}
    return read._replace(fields=read.fields | verification, unread=unread)


def verified_problem(row: Row, default_id: str, setting: str = "data.columns=") -> Problem:
    """What `verified_question` read, as a problem. default_id: its id where the row has none."""
    item = problem(row, default_id, setting)
    if "verifier" not in row.fields:
        return item
    return replace(item, verifier=row.fields["verifier"], details=row.fields.get("details", item.details))


def is_verifiable(row: Row) -> bool:
    """Whether a row is a problem: it asks something, and has what answers are graded by."""
    verifier = row.fields.get("verifier")
    if isinstance(verifier, str) and is_import_path(verifier):
        return "question" in recognise_problem(row._replace(fields=without_nulls(row.fields))).fields
    return is_problem(row)


def with_details(row: Row) -> Row:
    """The row with what its verifier needs as `details`, its answer as text, and the question with its options."""
    verifier = row.fields["verifier"]
    if verifier == "choice":
        return with_options(row)
    if verifier == "text":
        return with_aliases(row)
    if is_import_path(verifier):
        return with_itself(row)
    if "details" in row.fields:
        return row._replace(fields={**row.fields, "details": details_of(row)})
    return row


def details_of(row: Row) -> dict[str, Any]:
    """The row's own `details`, which a table may hold as JSON."""
    details = decoded(row.fields.get("details", {}))
    if not isinstance(details, dict):
        raise DirlError(f"{row.location}: details must be an object of what the verifier needs: correct it")
    return details


def with_options(row: Row) -> Row:
    """The row of a choice: `options` (or `choices`) by letter in its details, and below its question."""
    fields = dict(row.fields)
    details = details_of(row)
    notes = list(row.notes)
    texts = fields.pop("options", fields.pop("choices", None))
    if texts is not None:
        options = options_by_letter(row, decoded(texts))
        details["options"] = options
        question = str(fields.get("question", ""))
        if not all(text in question for text in options.values()):
            lines = [question, *(f"{letter}. {text}" for letter, text in options.items())]
            fields["question"] = "\n".join(lines)
            notes.append("the options stand below the question, each after its letter")

        # A whole number counts options from 0, as in MMLU's rows, unless it is what one of them says.
        answer = fields.get("ground_truth_answer")
        if type(answer) is int and str(answer) not in {*options, *options.values()}:
            if not 0 <= answer < len(options):
                raise DirlError(f"{row.location} has the answer {answer} and {len(options)} options: correct it")
            fields["ground_truth_answer"] = list(options)[answer]
            notes.append("the answer is a number, which counts the options from 0")
    if fields.get("ground_truth_answer") in (None, ""):
        details = {}  # nothing to grade by: it is left out, and counted
    return row._replace(fields={**fields, "details": details}, notes=tuple(notes))


def options_by_letter(row: Row, texts: Any) -> dict[str, str]:
    """Options that are a list, texts by letter, or an object of two lists, `label` and `text`, as ARC has them."""
    if isinstance(texts, Mapping) and {"label", "text"} <= texts.keys():
        texts = dict(zip(list(texts["label"]), list(texts["text"]), strict=False))
    elif isinstance(texts, list):
        texts = dict(zip(LETTERS, texts, strict=False))
    if not isinstance(texts, Mapping) or len(texts) < 2:
        raise DirlError(f"{row.location}: options must be a list of two or more texts, or texts by letter: correct it")
    options = {}
    for letter, text in texts.items():
        if len(str(letter)) != 1 or isinstance(text, bool) or not isinstance(text, str | int | float):
            raise DirlError(f"{row.location}: options must be texts by a letter each, not {letter}: {text}: correct it")
        options[str(letter).upper()] = str(text)
    return options


def with_aliases(row: Row) -> Row:
    """The row of a short text: its `aliases`, and of several answers the others, in its details."""
    fields = dict(row.fields)
    details = details_of(row)
    aliases = decoded(fields.pop("aliases", details.get("aliases", [])))
    answer = decoded(fields.get("ground_truth_answer"))
    if isinstance(answer, Mapping) and "value" in answer:  # as in TriviaQA's rows
        aliases = [*list(answer.get("aliases") or []), *aliases]
        fields["ground_truth_answer"] = answer["value"]
    elif isinstance(answer, list) and answer:
        fields["ground_truth_answer"] = answer[0]
        aliases = [*answer[1:], *aliases]
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise DirlError(f"{row.location}: aliases must be a list of texts: correct it")
    return row._replace(fields={**fields, "details": {**details, "aliases": aliases} if aliases else details})


def with_itself(row: Row) -> Row:
    """The row for a scorer of the user's own, which is given all of it; it may have no answer."""
    columns = {name: value for name, value in row.fields.items() if name != "verifier"}
    details = json.loads(json.dumps(columns, default=str))  # as it travels to other processes and to rollouts
    return row._replace(fields={"ground_truth_answer": "", **row.fields, "details": details})


def decoded(value: Any) -> Any:
    """What a table spells as JSON, as the list or object that it is; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
