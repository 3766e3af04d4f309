"""From text and chat messages to token ids, through the tokenizer's own chat template."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from dirl_cli.errors import DirlError
from dirl_cli.types import Problem

Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are trained
Piece = tuple[str, bool]  # a stretch of text, and whether it is trained


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, row: dict) -> Encoded:
    """The tokens of one demonstration and which of them are answer; see `encode_demonstrations`."""
    return encode_demonstrations(tokenizer, [row])[0]


def encode_demonstrations(tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict]) -> list[Encoded]:
    """Token ids of each row, and for each token whether it is trained.

    `{"prompt", "response"}` is taken as written and the response trained; of `{"messages"}` every assistant turn is,
    from the end of its generation prompt to the end of the turn. Text is split where a sampler's prompt would end, so
    that training sees the tokens that sampling sees. The last token ends a turn; it is added where it is missing.
    """
    pieces = [list(pieces_of(tokenizer, row)) for row in rows]
    tokens = iter(tokenize(tokenizer, [text for row in pieces for text, _ in row]))
    return [join(tokenizer, [(next(tokens), trained) for _, trained in row]) for row in pieces]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text and nothing around them, a thousand texts at a time to keep memory small."""
    batches = (texts[i : i + 1000] for i in range(0, len(texts), 1000))
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return [ids for batch in batches for ids in tokenizer(batch, **options)["input_ids"]]


def join(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[tuple[list[int], bool]]) -> Encoded:
    token_ids = [token for ids, _ in pieces for token in ids]
    trained = [flag for ids, flag in pieces for _ in ids]
    stop = turn_end(tokenizer)
    content = len(token_ids)
    while content and token_ids[content - 1] == tokenizer.pad_token_id != stop:
        content -= 1  # padding that a file brings along stays: it is trained anyway
    if not content or token_ids[content - 1] != stop:
        token_ids.insert(content, stop)
        trained.insert(content, True)
    return token_ids, trained


def pieces_of(tokenizer: PreTrainedTokenizerBase, row: dict) -> Iterable[Piece]:
    if "messages" in row:
        return pieces_of_messages(tokenizer, row["messages"])
    return [(row["prompt"], False), (row["response"], True)]


def pieces_of_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> Iterable[Piece]:
    """The rendered conversation, cut at the end of each generation prompt and of each assistant turn."""
    whole = render(tokenizer, messages)
    end = str(tokenizer.convert_ids_to_tokens(turn_end(tokenizer)))
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)
        if not whole.startswith(prompt) or len(prompt) < done:
            raise DirlError(
                "the tokenizer's chat template renders a conversation differently as it grows, so its assistant turns"
                " cannot be found: give the data as prompt and response instead"
            )
        yield whole[done : len(prompt)], False
        stop = whole.find(end, len(prompt))
        done = stop + len(end) if stop >= 0 else len(whole)
        yield whole[len(prompt) : done], True
    if not done:
        raise DirlError("a demonstration has no assistant message, so there is nothing to learn from it: remove it")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt that already holds a special token is taken as written; any other becomes a user turn."""
    if tokenizer.chat_template is None or any(token in text for token in tokenizer.all_special_tokens):
        return tokenize(tokenizer, [text])[0]
    return encode_messages(tokenizer, [{"role": "user", "content": text}])


def encode_question(tokenizer: PreTrainedTokenizerBase, question: str, instruction: str | None = None) -> list[int]:
    """The question as a user turn, the instruction on a line of its own, ready for the answer."""
    text = f"{question}\n{instruction}" if instruction else question
    if tokenizer.chat_template is None:
        return tokenize(tokenizer, [text])[0]
    return encode_messages(tokenizer, [{"role": "user", "content": text}])


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], instruction: str | None, longest: int
) -> list[list[int]]:
    """The prompt of each problem. Raises DirlError for the first that has more than `longest` tokens."""
    prompts = [encode_question(tokenizer, problem.question, instruction) for problem in problems]
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) > longest:
            raise DirlError(
                f"the prompt of problem {problem.id} has {len(prompt)} tokens and the model has room for {longest}:"
                " leave the problem out"
            )
    return prompts


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """What an answer says: its tokens up to the stop token as text, special tokens left out."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """The conversation so far, ready for the assistant's turn."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenize(tokenizer, [text])[0]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise DirlError("the tokenizer has no chat template: give prompt texts instead of messages")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))


@lru_cache(maxsize=8)
def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn: the last special token that the chat template puts there."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        rendered = tokenize(tokenizer, [render(tokenizer, turns)])[0]
        specials = [token for token in rendered if token in tokenizer.all_special_ids]
        if specials:
            return specials[-1]
    return tokenizer.eos_token_id
