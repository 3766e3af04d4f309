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

PLACEHOLDER = (
    "\ue000{}\ue001"  # private-use characters that hold the place of what the assistant says in the n-th message
)
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
    pieces = [pieces_of_row(tokenizer, row, instruction) for row in rows]
    tokens = iter(tokenize(tokenizer, [text for row in pieces for text, _ in row]))
    return [join_pieces(tokenizer, [(next(tokens), trained) for _, trained in row]) for row in pieces]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text and nothing around them, a thousand texts at a time to keep memory small."""
    batches = (texts[i : i + 1000] for i in range(0, len(texts), 1000))
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return [ids for batch in batches for ids in tokenizer(batch, **options)["input_ids"]]


def join_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[tuple[list[int], bool]]) -> Encoded:
    token_ids = [token for ids, _ in pieces for token in ids]
    trained = [flag for ids, flag in pieces for _ in ids]
    stop = turn_end(tokenizer)
    content = len(token_ids)
    while content and token_ids[content - 1] == tokenizer.pad_token_id != stop:
        content -= 1  # padding that a file brings along stays: it is trained anyway
    last = content
    while last and token_ids[last - 1] != stop and not str(tokenizer.decode(token_ids[last - 1 : last])).strip():
        last -= 1  # as does a line break behind the end
    if not last or token_ids[last - 1] != stop:
        token_ids.insert(content, stop)
        trained.insert(content, True)
    return token_ids, trained


def pieces_of_row(tokenizer: PreTrainedTokenizerBase, row: Row, instruction: Instruction) -> list[Piece]:
    try:
        return list(pieces_of(tokenizer, row.fields, instruction))
    except DirlError as error:
        raise DirlError(f"{row.location}: {error}") from error


def pieces_of(tokenizer: PreTrainedTokenizerBase, row: dict, instruction: Instruction) -> Iterable[Piece]:
    if "messages" in row:
        return pieces_of_messages(tokenizer, row["messages"])
    if "prompt" in row:
        return [(row["prompt"], False), (row["response"], True)]
    response = row["response"].removeprefix("<think>") if instruction.think else row["response"]
    return [(question_text(tokenizer, row["question"], instruction, row.get("system", "")), False), (response, True)]


def pieces_of_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Iterable[Piece]:
    """The rendered conversation, cut where the assistant begins to say something and where its turn ends.

    What an assistant says is found by its place, which stands behind the generation prompt that sampling would see.
    The turn is what the template still writes when the conversation ends there; of that, nothing but the way to the
    token that ends the turn is trained.
    """
    require_rendered_turns(tokenizer, messages)
    whole = render_frame(tokenizer, messages)
    end = str(tokenizer.convert_ids_to_tokens(turn_end(tokenizer)))
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        place = PLACEHOLDER.format(i)
        prompt, _, rest = whole.partition(place)
        if place in rest or (i and prompt != render_frame(tokenizer, messages[:i], add_generation_prompt=True)):
            raise DirlError(
                "the tokenizer's chat template renders a conversation differently as it grows, so its assistant turns"
                " cannot be found: give the data as prompt and response instead"
            )
        yield whole[done : len(prompt)], False

        said = len(prompt) + len(place)
        until = whole if i == len(messages) - 1 else render_frame(tokenizer, messages[: i + 1])
        turn, _, _ = until.partition(place)[2].partition(end)
        ending = turn + end if rest.startswith(turn + end) else ""
        if not ending and message.get("tool_calls"):
            raise DirlError("the chat template ends no turn that calls a tool: give the data as prompt and response")
        done = said + len(ending)
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
    """What an answer says: its tokens up to the stop token as text, special tokens left out."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """The conversation so far, ready for the assistant's turn."""
    require_rendered_turns(tokenizer, messages)
    text = render_frame(tokenizer, messages, add_generation_prompt=True)
    for i, message in enumerate(messages):
        text = text.replace(PLACEHOLDER.format(i), assistant_text(message))
    return tokenize(tokenizer, [text])[0]


def assistant_text(message: dict) -> str:
    """What an assistant says: the content as written, after the `reasoning_content` where there is one."""
    thought = message.get("reasoning_content")
    return f"<think>\n{thought.strip()}\n</think>\n\n{message['content']}" if thought else message["content"]


def render_frame(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """The conversation as the chat template renders it, with places instead of what the assistant says.

    Templates drop the thoughts of earlier turns and add empty ones where they find none: a model would be trained and
    prompted with what nobody wrote. So the template only sees places, and the thoughts that it adds are left out.
    """
    unsaid = [dict(message) for message in messages]
    for i, message in enumerate(unsaid):
        if message["role"] == "assistant":
            message |= {"content": PLACEHOLDER.format(i), "reasoning_content": None}
    return THOUGHTS_ADDED.sub("", render(tokenizer, unsaid, add_generation_prompt))


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise DirlError("the tokenizer has no chat template: give prompt texts instead of messages")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        turns, reason = ", ".join(message["role"] for message in messages), " ".join(str(error).split())
        raise DirlError(
            f"the tokenizer's chat template refuses a conversation of {turns} ({reason}):"
            " leave such rows out, or give the data as prompt and response"
        ) from error


def require_rendered_turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> None:
    """Raises DirlError for a turn of which the chat template writes nothing, as of a role that it does not know."""
    marked = [
        {**message, "content": PLACEHOLDER.format(i) if message["content"].strip() else "", "reasoning_content": None}
        for i, message in enumerate(messages)
    ]
    unheard = first_unrendered_turn(tokenizer, json.dumps(marked, default=str))
    if unheard is not None:
        raise DirlError(
            f"the tokenizer's chat template writes nothing of turn {unheard + 1}, whose role is"
            f" {messages[unheard]['role']}: give it a role that the template knows, such as user or assistant, or give"
            " the data as prompt and response"
        )


@lru_cache(maxsize=1024)
def first_unrendered_turn(tokenizer: PreTrainedTokenizerBase, marked: str) -> int | None:
    """The first turn whose place is not in what the template writes of these messages, which are alike in most rows."""
    messages = json.loads(marked)
    text = render(tokenizer, messages)
    unheard = (i for i, message in enumerate(messages) if message["content"] not in text)
    return next(unheard, None)


@lru_cache(maxsize=8)
def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn: the first special token that the chat template puts behind its words."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACEHOLDER.format(1)}]
        _, _, behind = render(tokenizer, turns).partition(PLACEHOLDER.format(1))
        specials = [token for token in tokenize(tokenizer, [behind])[0] if token in tokenizer.all_special_ids]
        if specials:
            return specials[0]
    return tokenizer.eos_token_id
