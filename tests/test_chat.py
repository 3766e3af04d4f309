"""From demonstrations and prompts to tokens: what is trained, and that sampling sees what training saw."""

import json
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.data.chat import (
    encode_demonstration,
    encode_demonstrations,
    encode_messages,
    encode_prompt,
    encode_question,
    turn_end,
)
from dirl_cli.errors import DirlError
from dirl_cli.models.tokenizer import train_tokenizer

PAD, END = 0, 2
ASK, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(islice(Arithmetic(train=500).texts(), 1000))


@pytest.fixture
def changeable() -> PreTrainedTokenizerBase:
    """One whose template a test may replace."""
    return train_tokenizer(["a b c"])


def trained_text(tokenizer: PreTrainedTokenizerBase, row: dict) -> str:
    """What is trained, with a bar for what is not."""
    text, last = "", True
    for token, trained in zip(*encode_demonstration(tokenizer, row), strict=True):
        text += tokenizer.decode([token]) if trained else "|" * last
        last = trained
    return text


@pytest.mark.parametrize(
    ("response", "ending"),
    [
        ("yo", [END]),
        ("yo<|im_end|>", [END]),
        ("yo<|im_end|><|endoftext|>", [END, PAD]),
        ("yo<|endoftext|>", [END, PAD]),
        ("", [END]),
    ],
)
def test_a_response_is_trained_and_ends_in_one_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, response: str, ending: list[int]
) -> None:
    ids, trained = encode_demonstration(tokenizer, {"prompt": "ask ", "response": response})
    prompt = tokenizer("ask ")["input_ids"]
    assert ids[: len(prompt)] == prompt and trained == [i >= len(prompt) for i in range(len(ids))]
    assert ids[-len(ending) :] == ending and ids.count(END) == 1


def test_of_a_conversation_every_assistant_turn_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "S"}, ASK, REPLY, ASK, {"role": "assistant", "content": "yo again"}]
    assert trained_text(tokenizer, {"messages": messages}) == "|yo<|im_end|>|yo again<|im_end|>"
    ids, _ = encode_demonstration(tokenizer, {"messages": messages})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == whole.removesuffix("\n")


def test_an_empty_reply_is_an_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert trained_text(tokenizer, {"messages": [ASK, {"role": "assistant", "content": ""}]}) == "|<|im_end|>"


def test_what_follows_the_last_reply_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    both = [encode_demonstration(tokenizer, {"messages": messages}) for messages in ([ASK, REPLY], [ASK, REPLY, ASK])]
    assert both[0] == both[1]


def test_a_demonstration_begins_with_the_tokens_that_are_sampled_from(tokenizer: PreTrainedTokenizerBase) -> None:
    for content in (
        "yo",
        "\nyo",
        " yo",
        "\n\n",
    ):  # also where it would join the prompt's last token
        ids, trained = encode_demonstration(tokenizer, {"messages": [ASK, {"role": "assistant", "content": content}]})
        assert ids[: trained.index(True)] == encode_question(tokenizer, "hi")


def test_rows_are_encoded_together_as_they_are_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [ASK, REPLY]}, {"prompt": "a", "response": "b"}, {"messages": [ASK, REPLY, ASK, REPLY]}]
    assert encode_demonstrations(tokenizer, rows) == [encode_demonstration(tokenizer, row) for row in rows]
    assert encode_demonstrations(tokenizer, []) == []


def test_a_prompt_with_special_tokens_is_taken_as_written(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, "<|im_start|>user\nhi")) == "<|im_start|>user\nhi"


def test_a_plain_prompt_becomes_a_user_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == rendered
    assert encode_messages(tokenizer, [ASK]) == encode_prompt(tokenizer, "hi")


def test_the_instruction_stands_on_its_own_line(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "user\n1+1?\nBox it.<|im_end|>" in tokenizer.decode(encode_question(tokenizer, "1+1?", "Box it."))
    assert "user\n1+1?<|im_end|>" in tokenizer.decode(encode_question(tokenizer, "1+1?"))


def test_a_template_that_rewrites_what_was_said_is_an_error(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template = "{{ messages|length }}" + changeable.chat_template
    with pytest.raises(DirlError, match="give the data as prompt and response"):
        encode_demonstration(changeable, {"messages": [ASK, REPLY]})


def test_without_a_template_texts_are_taken_as_written_and_messages_are_an_error(
    changeable: PreTrainedTokenizerBase,
) -> None:
    changeable.chat_template = None
    assert changeable.decode(encode_prompt(changeable, "hi")) == changeable.decode(encode_question(changeable, "hi"))
    assert encode_demonstration(changeable, {"prompt": "a", "response": "b"})[0][-1] == END
    with pytest.raises(DirlError, match="no chat template"):
        encode_messages(changeable, [ASK])


def test_the_end_of_turn_is_found_in_the_template(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert turn_end(changeable) == PAD
    assert trained_text(changeable, {"messages": [ASK, REPLY, ASK, REPLY]}) == "|yo<|endoftext|>|yo<|endoftext|>"
    assert encode_demonstration(changeable, {"prompt": "a", "response": "b<|endoftext|>"})[0].count(PAD) == 1


needs_tokenizer = pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizer of ../shared is not here")


@pytest.fixture(scope="module")
def published() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHARED / "models" / "sdar-tokenizer")


@needs_tokenizer
def test_the_published_template_is_trained_on_turn_by_turn(published: PreTrainedTokenizerBase) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"}
    text = trained_text(published, {"messages": [ASK, REPLY, ASK, thought]})
    assert text == "|yo<|im_end|>|<think>\nhm\n</think>\n\nok<|im_end|>"


@needs_tokenizer
def test_a_published_demonstration_ends_in_one_end_of_turn_and_its_padding(published: PreTrainedTokenizerBase) -> None:
    rows = json.loads((SHARED / "data" / "GSM8K-train-sft.json").read_text())[:20]
    for row, (ids, trained) in zip(rows, encode_demonstrations(published, rows), strict=True):
        assert ids[-2:] == [151645, 151643]
        assert published.decode([i for i, flag in zip(ids, trained, strict=True) if flag]) == row["response"]
        question = row["prompt"].removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]
        assert encode_question(published, question) == ids[: trained.index(True)]
