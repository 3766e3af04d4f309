"""From demonstrations and prompts to tokens: what is trained, and that sampling sees what training saw."""

import json
from itertools import islice
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from dirl_cli.cli.build import build
from dirl_cli.data.arithmetic import Arithmetic
from dirl_cli.data.chat import (
    LONGEST_FRAME,
    encode_demonstrations,
    encode_messages,
    encode_prompt,
    encode_question,
    first_stop,
    first_unrendered_turn,
    question_text,
    turn_end,
)
from dirl_cli.data.rows import Row
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.models.tiny import train_tokenizer
from dirl_cli.types import Instruction

PAD, END = 0, 2
LINE = 202  # a line break
PLAIN = Instruction()
ASK, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(islice(Arithmetic(train=500).texts(), 1000))


@pytest.fixture
def changeable() -> PreTrainedTokenizerBase:
    """One whose template a test may replace."""
    return train_tokenizer(["a b c"])


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, row: dict, instruction=PLAIN) -> tuple[list, list]:
    return encode_demonstrations(tokenizer, [Row("row 1", row)], instruction)[0]


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
        ("yo<|im_end|>\n", [END, LINE]),
        ("yo<|im_end|>\n<|endoftext|>", [END, LINE, PAD]),
        ("yo\n", [LINE, END]),
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
        assert ids[: trained.index(True)] == encode_question(tokenizer, "hi", PLAIN)


def test_rows_are_encoded_together_as_they_are_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [ASK, REPLY]}, {"prompt": "a", "response": "b"}, {"messages": [ASK, REPLY, ASK, REPLY]}]
    placed = [Row(f"row {i}", row) for i, row in enumerate(rows)]
    assert encode_demonstrations(tokenizer, placed, PLAIN) == [encode_demonstration(tokenizer, row) for row in rows]
    assert encode_demonstrations(tokenizer, [], PLAIN) == []


def test_a_prompt_with_special_tokens_is_taken_as_written(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, "<|im_start|>user\nhi")) == "<|im_start|>user\nhi"


def test_a_plain_prompt_becomes_a_user_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == rendered
    assert encode_messages(tokenizer, [ASK]) == encode_prompt(tokenizer, "hi")


def test_the_instruction_stands_on_its_own_line(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "user\n1+1?\nBox it.<|im_end|>" in tokenizer.decode(
        encode_question(tokenizer, "1+1?", Instruction("Box it."))
    )
    assert "user\n1+1?<|im_end|>" in tokenizer.decode(encode_question(tokenizer, "1+1?", PLAIN))


def test_a_template_that_rewrites_what_was_said_is_an_error(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template = "{{ messages|length }}" + changeable.chat_template
    with pytest.raises(DirlError, match="give the data as prompt and response"):
        encode_demonstration(changeable, {"messages": [ASK, REPLY]})


# How others write conversations; the second is Phi-3's kind, whose one end of text stands behind the last turn only.
LOOP = "{% for m in messages %}"
ENDED_ONCE = LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "an end of text behind it all": (
        ENDED_ONCE + "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "|yo<|im_end|>|yo again<|im_end|>",
    ),
    "no special token at all": (
        LOOP + "### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        "|yo|yo again<|im_end|>",
    ),
    "an end of text instead of the last line break": (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        "|yo|yo again<|endoftext|>",
    ),
    "a space before each end": (
        LOOP + "{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %} <|endoftext|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "|yo <|endoftext|>|yo again <|endoftext|>",
    ),
    "the next speaker as the end": (
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "|yo|yo again<|im_end|>",
    ),
}


@pytest.mark.parametrize(("template", "trained"), TEMPLATES.values(), ids=TEMPLATES)
def test_under_any_template_what_the_assistant_says_is_trained_and_the_way_to_its_end(
    changeable: PreTrainedTokenizerBase, template: str, trained: str
) -> None:
    changeable.chat_template = template
    messages = [ASK, REPLY, ASK, {"role": "assistant", "content": "yo again"}]
    assert trained_text(changeable, {"messages": messages}) == trained
    ids, flags = encode_demonstration(changeable, {"messages": messages})
    assert "\ue000" not in changeable.decode(ids)
    assert ids[: flags.index(True)] == encode_messages(changeable, [ASK])
    second = encode_messages(changeable, messages[:3])
    assert changeable.decode(ids).startswith(changeable.decode(second))


def test_what_a_turn_says_is_not_lost_in_a_template_that_says_it_twice(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template += "{% if messages|length > 1 %}{{ messages[1].content }}{% endif %}"
    with pytest.raises(DirlError, match=r"^row 1: .* its assistant turns cannot be found: give the data as prompt and"):
        encode_demonstration(changeable, {"messages": [ASK, REPLY]})


@pytest.mark.parametrize("role", ["function_call", "observation", "narrator"])
def test_a_turn_that_the_template_leaves_out_is_told_with_its_row(
    published: PreTrainedTokenizerBase, role: str
) -> None:
    messages = [ASK, {"role": role, "content": "hi"}, REPLY]
    sentence = f"chat template writes nothing of turn 2, whose role is {role}"
    with pytest.raises(DirlError, match=rf"^row 1: the tokenizer's {sentence}"):
        encode_demonstration(published, {"messages": messages})
    with pytest.raises(DirlError, match=sentence):
        encode_messages(published, messages[:2])


def test_fields_of_a_conversation_are_remembered_only_where_they_are_short(published: PreTrainedTokenizerBase) -> None:
    """What a server is asked would stay in its memory otherwise."""
    first_unrendered_turn.cache_clear()
    encode_messages(published, [{**ASK, "name": "a" * LONGEST_FRAME}])
    assert first_unrendered_turn.cache_info().currsize == 0
    encode_messages(published, [{**ASK, "name": "a"}])
    assert first_unrendered_turn.cache_info().currsize == 1
    with pytest.raises(DirlError, match="writes nothing of turn 2, whose role is narrator"):
        encode_messages(published, [ASK, {"role": "narrator", "content": "hi", "name": "a" * LONGEST_FRAME}])


def test_a_system_prompt_that_the_template_leaves_out_is_told(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DirlError, match="writes nothing of turn 1, whose role is system"):
        encode_question(changeable, "hi", Instruction("Box it.", "system"))


def test_a_conversation_may_begin_with_the_assistant(tokenizer: PreTrainedTokenizerBase) -> None:
    greeting = {"role": "assistant", "content": "hello"}
    assert trained_text(tokenizer, {"messages": [greeting, ASK, REPLY]}) == "|hello<|im_end|>|yo<|im_end|>"


def test_a_refusal_of_the_template_names_the_row(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(DirlError, match=r"^row 1: .* refuses a conversation of user, assistant \(Roles must alternate"):
        encode_demonstration(changeable, {"messages": [ASK, REPLY]})


def test_a_system_prompt_stands_before_the_question_and_before_what_the_instruction_says_there() -> None:
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}
    assert Instruction().messages("hi", "Be kind.") == [system, user]
    both = {"role": "system", "content": "Be kind.\nBox it."}
    assert Instruction("Box it.", "system").messages("hi", "Be kind.") == [both, user]


def test_without_a_template_texts_are_taken_as_written_and_messages_are_an_error(
    changeable: PreTrainedTokenizerBase,
) -> None:
    changeable.chat_template = None
    assert changeable.decode(encode_prompt(changeable, "hi")) == changeable.decode(
        encode_question(changeable, "hi", PLAIN)
    )
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


@pytest.fixture(scope="module")
def published(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "sdar-tokenizer")


THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"}
EMPTY = "<think>\n\n</think>\n\n"
THINKING = Instruction("Box it.", "system", think=True)

# What generation prompts end in: of SDAR's template, of Qwen3's with enable_thinking=false, of Qwen3-Thinking-2507's.
OPENINGS = ["", EMPTY, "<think>\n"]


@pytest.fixture(params=OPENINGS)
def opening(request, published: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The published tokenizer with a template that begins answers in its own way."""
    before = published.chat_template
    start = "{{- '<|im_start|>assistant\\n' }}"
    assert before.count(start) == 1
    published.chat_template = before.replace(start, start.replace("\\n'", f"\\n{request.param}'".replace("\n", "\\n")))
    assert published.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True).endswith(
        f"<|im_start|>assistant\n{request.param}"
    )
    yield published
    published.chat_template = before


def test_of_published_conversations_what_was_said_is_trained_and_nothing_else(opening: PreTrainedTokenizerBase) -> None:
    assert EMPTY in opening.apply_chat_template([ASK, REPLY], tokenize=False)
    for said, text in [
        ([REPLY], "|yo<|im_end|>"),
        ([THOUGHT], "|<think>\nhm\n</think>\n\nok<|im_end|>"),
        ([REPLY, ASK, THOUGHT], "|yo<|im_end|>|<think>\nhm\n</think>\n\nok<|im_end|>"),
        ([THOUGHT, ASK, REPLY], "|<think>\nhm\n</think>\n\nok<|im_end|>|yo<|im_end|>"),
        ([REPLY, REPLY], "|yo<|im_end|>|yo<|im_end|>"),
        ([{"role": "assistant", "content": f"{EMPTY}yo"}], f"|{EMPTY}yo<|im_end|>"),
        ([{**REPLY, "reasoning_content": "hm\n"}], "|<think>\nhm\n</think>\n\nyo<|im_end|>"),
        ([{**REPLY, "reasoning_content": None, "name": "Bob"}], "|yo<|im_end|>"),
    ]:
        assert trained_text(opening, {"messages": [ASK, *said]}) == text


def test_a_published_conversation_is_sampled_from_as_it_is_trained(opening: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "S"}, ASK, THOUGHT, ASK, {**REPLY, "reasoning_content": "hm"}, ASK, REPLY]
    ids, _ = encode_demonstration(opening, {"messages": messages})
    for turn in (2, 4, 6):
        prompt = encode_messages(opening, messages[:turn])
        assert prompt == ids[: len(prompt)] and opening.decode(prompt).endswith(
            "user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_tool_call_is_trained_with_the_turn_that_makes_it(published: PreTrainedTokenizerBase) -> None:
    call = {**REPLY, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    text = trained_text(published, {"messages": [ASK, call, {"role": "tool", "content": "2"}, REPLY]})
    assert text == ('|yo\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>|yo<|im_end|>')


@pytest.mark.parametrize(
    ("instruction", "prompt"),
    [
        (PLAIN, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (Instruction("Box it."), "<|im_start|>user\nhi\nBox it.<|im_end|>\n<|im_start|>assistant\n"),
        (
            THINKING,
            "<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>",
        ),
    ],
)
def test_a_question_is_put_as_the_instruction_says_when_trained_and_sampled(
    opening: PreTrainedTokenizerBase, instruction: Instruction, prompt: str
) -> None:
    ids = encode_question(opening, "hi", instruction)
    assert opening.decode(ids) == prompt
    response = "<think>\nhm\n</think>\n\nok" if instruction.think else "ok"
    token_ids, trained = encode_demonstration(opening, {"question": "hi", "response": response}, instruction)
    assert token_ids[: trained.index(True)] == ids and all(trained[len(ids) :])
    assert opening.decode(token_ids) == prompt + response.removeprefix("<think>") + "<|im_end|>"


def test_the_protocols_are_worded_as_published(published: PreTrainedTokenizerBase) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        boxed, thinking, none = (
            build(compose("eval", [f"instruction={name}"]).instruction, Instruction)
            for name in ("boxed", "thinking", "none")
        )
        chosen = [compose("eval", words).instruction.text for words in ([], ["bench=file", "bench.path=a"])]
    box = r"Please reason step by step, and put your final answer within $\boxed{}$."
    turn = "<|im_start|>assistant\n"
    assert question_text(published, "1+1?", boxed) == f"<|im_start|>user\n1+1?\n{box}<|im_end|>\n{turn}"
    assert question_text(published, "1+1?", none) == f"<|im_start|>user\n1+1?<|im_end|>\n{turn}"
    assert question_text(published, "1+1?", thinking) == (
        f"<|im_start|>system\n{box}<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n{turn}<think>"
    )
    assert chosen == [None, box]  # the embedded problems are put as they are


def test_a_role_that_there_is_not_is_told() -> None:
    with pytest.raises(DirlError, match=r"instruction.role=sytem: did you mean system"):
        Instruction("Box it.", "sytem")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}", "No system role."),
        ("{{ messages[0].name + messages[1].content }}", "'dict object' has no attribute 'name'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% for m in messages %}", "Unexpected end of template"),
    ],
)
def test_a_template_that_fails_is_told_in_one_sentence(
    changeable: PreTrainedTokenizerBase, template: str, reason: str
) -> None:
    changeable.chat_template = template
    with pytest.raises(DirlError) as caught:
        encode_messages(changeable, [{"role": "system", "content": "S"}, ASK])
    assert f"refuses a conversation of system, user ({reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_trims_what_is_said_is_not_asked_to(changeable: PreTrainedTokenizerBase) -> None:
    changeable.chat_template = changeable.chat_template.replace("message['content']", "message['content'] | trim")
    assert (
        changeable.apply_chat_template([{**ASK, "content": " hi "}], tokenize=False)
        == "<|im_start|>user\nhi<|im_end|>\n"
    )
    assert trained_text(changeable, {"messages": [ASK, {"role": "assistant", "content": "yo\n"}]}) == "|yo\n<|im_end|>"


def test_published_files_slow_and_fast_give_the_same_tokens(published: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    published.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (Path(published.name_or_path) / "tokenizer.json").exists()
    fast = AutoTokenizer.from_pretrained(tmp_path)
    fields = [{"messages": [ASK, REPLY, ASK, THOUGHT]}, {"question": "x² ≤ 2?", "response": "\\boxed{é}"}]
    rows = [Row("row", one) for one in fields]
    assert encode_demonstrations(fast, rows, THINKING) == encode_demonstrations(published, rows, THINKING)


def test_a_tokenizer_written_in_python_is_trained_on_as_any_other(changeable: PreTrainedTokenizerBase) -> None:
    slow = ByT5Tokenizer(chat_template=changeable.chat_template)
    slow.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert not slow.is_fast
    row = {"messages": [ASK, THOUGHT, ASK, REPLY]}
    assert encode_demonstration(slow, row)[0] != encode_demonstration(changeable, row)[0]
    ids, trained = encode_demonstration(slow, row)
    said = slow.decode([token for token, flag in zip(ids, trained, strict=True) if flag])
    assert said == "<think>\nhm\n</think>\n\nok<|im_end|>yo<|im_end|>"


def test_a_published_demonstration_ends_in_one_end_of_turn_and_its_padding(
    published: PreTrainedTokenizerBase, shared: Path
) -> None:
    rows = json.loads((shared / "data" / "GSM8K-train-sft.json").read_text())[:20]
    placed = [Row("row", row) for row in rows]
    for row, (ids, trained) in zip(rows, encode_demonstrations(published, placed, PLAIN), strict=True):
        assert ids[-2:] == [151645, 151643]
        assert published.decode([i for i, flag in zip(ids, trained, strict=True) if flag]) == row["response"]
        question = row["prompt"].removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]
        assert encode_question(published, question, PLAIN) == ids[: trained.index(True)]


def test_the_first_of_several_stop_strings_counts():
    assert first_stop("a\n\nb END", ["END", "\n\n"]) == 1
    assert first_stop("a", ["END"]) is None
