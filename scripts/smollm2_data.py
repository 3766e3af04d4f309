"""GSM8K's training problems as the rows that the stages of scripts/smollm2.sh learn from.

python scripts/smollm2_data.py gsm8k DIR [SOURCE]     # demonstrations, problems and questions
python scripts/smollm2_data.py own DIR COMPLETIONS    # demonstrations of a model's own answers that came to an end
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from dirl_cli.data.rows import Row, read_rows
from dirl_cli.errors import DirlError
from dirl_cli.files import write_text
from dirl_cli.reward.boxed import last_boxed

QUESTIONS = 400  # that the model is asked for answers of its own
TURN = re.compile(r"<\|im_start\|>user\n(.*)\nPlease reason step by step.*<\|im_end\|>", re.DOTALL)
CALCULATED = re.compile(r"<<.*?>>")  # what GSM8K's authors gave to a calculator


def solved(row: Row) -> dict[str, str]:
    """Question and boxed response of a row of openai/gsm8k, or of one in which the prompt is written out."""
    fields = row.fields
    if "prompt" in fields:
        found = TURN.search(fields["prompt"])
        if not found:
            raise DirlError(
                f"{row.location}: the prompt asks for no box as GSM8K's do: give rows of question and answer"
            )
        return {"question": found[1], "response": fields["response"].split("<|im_end|>")[0]}
    working, answer = CALCULATED.sub("", fields["answer"]).split("####")
    return {"question": fields["question"], "response": f"{working}The answer is $\\boxed{{{answer.strip()}}}$."}


def gsm8k(directory: Path, source: str = "openai/gsm8k") -> None:
    rows = [solved(row) for row in read_rows(source, *(() if Path(source).exists() else ("train", "main")))]
    write(directory / "demonstrations.jsonl", rows)
    problems = ({"question": row["question"], "ground_truth_answer": last_boxed(row["response"])} for row in rows)
    write(directory / "problems.jsonl", problems)
    write(directory / "questions.jsonl", ({"question": row["question"]} for row in rows[:QUESTIONS]))


def own(directory: Path, completions: str) -> None:
    ended = (row.fields for row in read_rows(completions) if row.fields["stop_reason"] == "stop")
    write(directory / "own.jsonl", ({"question": line["question"], "response": line["text"]} for line in ended))


def write(file: Path, rows: Iterable[dict]) -> None:
    write_text(file, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    stage, where, *source = sys.argv[1:]
    try:
        {"gsm8k": gsm8k, "own": own}[stage](Path(where), *source)
    except DirlError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
