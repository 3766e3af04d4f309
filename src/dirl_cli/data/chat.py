"""From text and chat messages to token ids, through the tokenizer's own chat template."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.types import Instruction, Problem

Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are trained
Piece = tuple[str, bool]  # a stretch of text, and whether it is trained

# Private-use characters that hold the place of what the assistant says in the n-th message.
PLACEHOLDER = "\ue000{}\ue001"
LONGEST_FRAME = 4096  # letters of the messages with placeholders, of which a thousand are remembered
THOUGHTS_ADDED = re.compile("<think>\\s*(</think>\\s*)?(?=\ue000|\\Z)")


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], instruction: Instruction
) -> list[Encoded]:
    """Token ids of each row, and for each token whether it is trained.

    `{"prompt", "response"}` is taken as written and the response trained; `{"question", "response"}` is put as the
    instruction says, after its `system` if it has one; of `{"messages"}` what the assistant says is trained, each
    time to the token that ends its turn. Text is split where a sampler's prompt would end, so that training sees the
    tokens that sampling sees. The last token ends a turn; it is added where it is missing.
    Raises DirlError that names the row for which the chat template has no place.
    """
    pieces_by_row = [pieces_of_row(tokenizer, row, instruction) for row in rows]

    # One call tokenizes the texts of all rows, since fast tokenizers spread a batch over the cores.
    texts: list[str] = []
    for pieces in pieces_by_row:
        texts += [text for text, _ in pieces]
    token_ids = iter(tokenize(tokenizer, texts))

    encoded = []
    for pieces in pieces_by_row:
        tokenized = [(next(token_ids), trained) for _, trained in pieces]
        encoded.append(join_pieces(tokenizer, tokenized))
    return encoded


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text and nothing around them, a thousand texts at a time to keep memory small."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    token_ids: list[list[int]] = []
    for i in range(0, len(texts), 1000):
        token_ids += tokenizer(texts[i : i + 1000], **options)["input_ids"]
    return token_ids


def join_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[tuple[list[int], bool]]) -> Encoded:
    """An example from its pieces, each token ids and whether they are trained; its turn's end is added if missing."""
    token_ids: list[int] = []
    trained: list[bool] = []
    for ids, is_trained in pieces:
        token_ids += ids
        trained += [is_trained] * len(ids)

    # Padding and white space behind the end stay, as a file brings them along, but they do not hide it.
    stop = turn_end(tokenizer)
    content = len(token_ids)
    while content and token_ids[content - 1] == tokenizer.pad_token_id != stop:
        content -= 1
    last = content
    while last and token_ids[last - 1] != stop and not str(tokenizer.decode(token_ids[last - 1 : last])).strip():
        last -= 1
    if not last or token_ids[last - 1] != stop:
        token_ids.insert(content, stop)
        trained.insert(content, True)
    return token_ids, trained


def pieces_of_row(tokenizer: PreTrainedTokenizerBase, row: Row, instruction: Instruction) -> list[Piece]:
    """The pieces of a row; an error names the row."""
    try:
        return list(pieces_of(tokenizer, row.fields, instruction))
    except DirlError as error:
        raise DirlError(f"{row.location}: {error}") from error


def pieces_of(tokenizer: PreTrainedTokenizerBase, row: dict, instruction: Instruction) -> Iterable[Piece]:
    if "messages" in row:
        return pieces_of_messages(tokenizer, row["messages"])
    if "prompt" in row:
        return [(row["prompt"], False), (row["response"], True)]
    question = question_text(tokenizer, row["question"], instruction, row.get("system", ""))
    response = row["response"]
    if instruction.think:
        response = response.removeprefix("<think>")  # with which the prompt ends already
    return [(question, False), (response, True)]


def pieces_of_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Iterable[Piece]:
    """The rendered conversation, cut where the assistant begins to say something and where its turn ends.

    What an assistant says is found by its placeholder, which stands behind the generation prompt that sampling would
    see. The turn is what the template still writes when the conversation ends there; of that, nothing but the way to
    the token that ends the turn is trained.
    Raises DirlError where the template's assistant turns cannot be told apart, or where there are none.
    """
    require_rendered_turns(tokenizer, messages)
    conversation = render_frame(tokenizer, messages)
    end = str(tokenizer.convert_ids_to_tokens(turn_end(tokenizer)))
    done = 0  # characters of the conversation that are in pieces already
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue

        # What stands before must be the very prompt that sampling would end with.
        placeholder = PLACEHOLDER.format(i)
        prompt, _, remainder = conversation.partition(placeholder)
        is_repeated = placeholder in remainder
        if is_repeated or (i and prompt != render_frame(tokenizer, messages[:i], add_generation_prompt=True)):
            raise DirlError(
                "the tokenizer's chat template renders a conversation differently as it grows, so its assistant turns"
                " cannot be found: give the data as prompt and response instead"
            )
        yield conversation[done : len(prompt)], False

        # The turn's end, as the template writes it were this the last message.
        so_far = conversation if i == len(messages) - 1 else render_frame(tokenizer, messages[: i + 1])
        before_end, _, _ = so_far.partition(placeholder)[2].partition(end)
        ending = before_end + end if remainder.startswith(before_end + end) else ""
        if not ending and message.get("tool_calls"):
            raise DirlError("the chat template ends no turn that calls a tool: give the data as prompt and response")
        done = len(prompt) + len(placeholder) + len(ending)
        yield assistant_text(message) + ending, True
    if not done:
        raise DirlError("a demonstration has no assistant message, so there is nothing to learn from: remove it")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt that already holds a special token is taken as written; any other becomes a user turn."""
    if any(token in text for token in tokenizer.all_special_tokens):
        return tokenize(tokenizer, [text])[0]
    return encode_question(tokenizer, text, Instruction())


def encode_question(tokenizer: PreTrainedTokenizerBase, question: str, instruction: Instruction) -> list[int]:
    """The question put as the instruction says, ready for the answer."""
    return tokenize(tokenizer, [question_text(tokenizer, question, instruction)])[0]


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], instruction: Instruction, longest: int
) -> list[list[int]]:
    """The prompt of each problem. Raises DirlError for the first that has more than `longest` tokens."""
    prompts = encode_questions(tokenizer, problems, instruction)
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) > longest:
            raise DirlError(
                f"the prompt of problem {problem.id} has {len(prompt)} tokens and the model has room for {longest}:"
                " leave the problem out"
            )
    return prompts


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem], instruction: Instruction
) -> list[list[int]]:
    """The prompt of each problem, however long."""
    prompts = [question_text(tokenizer, problem.question, instruction, problem.system) for problem in problems]
    return tokenize(tokenizer, prompts)


def question_text(tokenizer: PreTrainedTokenizerBase, question: str, instruction: Instruction, system: str = "") -> str:
    """The prompt that puts a question; without a chat template its turns are lines."""
    messages = instruction.messages(question, system)
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
    else:
        require_rendered_turns(tokenizer, messages)
        text = render_frame(tokenizer, messages, add_generation_prompt=True)
    return f"{text}<think>" if instruction.think else text


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of an answer: its tokens up to the stop token, special tokens left out."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in a text; None where none is in it."""
    starts = [text.index(stop) for stop in stop_strings if stop in text]
    return min(starts, default=None)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """The conversation so far, ready for the assistant's turn."""
    require_rendered_turns(tokenizer, messages)
    text = render_frame(tokenizer, messages, add_generation_prompt=True)
    for i, message in enumerate(messages):
        text = text.replace(PLACEHOLDER.format(i), assistant_text(message))
    return tokenize(tokenizer, [text])[0]


def assistant_text(message: dict) -> str:
    """The words of an assistant's turn: the content as written, after the `reasoning_content` where there is one."""
    thought = message.get("reasoning_content")
    return f"<think>\n{thought.strip()}\n</think>\n\n{message['content']}" if thought else message["content"]


def render_frame(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The conversation as the chat template renders it, with placeholders instead of what the assistant says.

    Templates drop the thoughts of earlier turns and add empty ones where they find none: a model would be trained and
    prompted with what nobody wrote. So the template only sees placeholders, and the thoughts that it adds are left out.
    """
    framed = [dict(message) for message in messages]
    for i, message in enumerate(framed):
        if message["role"] == "assistant":
            message |= {"content": PLACEHOLDER.format(i), "reasoning_content": None}
    return THOUGHTS_ADDED.sub("", render(tokenizer, framed, add_generation_prompt))


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The conversation as the chat template writes it. Raises DirlError where it refuses to, or where there is none."""
    if tokenizer.chat_template is None:
        raise DirlError("the tokenizer has no chat template: give prompt texts instead of messages")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        turns = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())
        raise DirlError(
            f"the tokenizer's chat template refuses a conversation of {turns} ({reason}):"
            " leave such rows out, or give the data as prompt and response"
        ) from error


def require_rendered_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> None:
    """Raises DirlError for a turn of which the chat template writes nothing, as of a role that it does not know."""
    marked = []
    for i, message in enumerate(messages):
        content = PLACEHOLDER.format(i) if message["content"].strip() else ""
        marked.append({**message, "content": content, "reasoning_content": None})
    frame = json.dumps(marked, default=str)
    find = first_unrendered_turn if len(frame) <= LONGEST_FRAME else first_unrendered_turn.__wrapped__
    unrendered = find(tokenizer, frame)
    if unrendered is not None:
        raise DirlError(
            f"the tokenizer's chat template writes nothing of turn {unrendered + 1}, whose role is"
            f" {messages[unrendered]['role']}: give it a role that the template knows, such as user or assistant, or"
            " give the data as prompt and response"
        )


@lru_cache(maxsize=1024)
def first_unrendered_turn(tokenizer: PreTrainedTokenizerBase, marked: str) -> int | None:
    """The first turn whose placeholder the template does not write; None if it writes all.

    marked: the messages with placeholders, as JSON: most rows have the same, so that the answer is cached.
    """
    messages = json.loads(marked)
    text = render(tokenizer, messages)
    for i, message in enumerate(messages):
        if message["content"] not in text:
            return i
    return None


@lru_cache(maxsize=8)
def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn: the first special token that the chat template puts behind its words."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACEHOLDER.format(1)}]
        _, _, ending = render(tokenizer, turns).partition(PLACEHOLDER.format(1))
        for token in tokenize(tokenizer, [ending])[0]:
            if token in tokenizer.all_special_ids:
                return token
    return tokenizer.eos_token_id
