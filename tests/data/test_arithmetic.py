"""The embedded word problems, and the tokenizer that is trained on them."""

import re
from itertools import islice

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dirl_cli.data.arithmetic import Arithmetic, draw_splits
from dirl_cli.errors import DirlError
from dirl_cli.models.tiny import SPECIAL, train_tokenizer

SMALL = Arithmetic(train=2000, held_out=50, test=200)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(islice(Arithmetic().texts(), 2000))


def answer_of(question: str) -> int:
    """Solve a question from its words alone."""
    gains = ("buys", "finds", "gets", "wins")
    start = int(re.search(r"has (\d)", question)[1])
    changes = re.findall(r"\. \w+ (\w+) (\d)(?=\.)", question)
    return start + sum(int(n) if verb in gains else -int(n) for verb, n in changes)


def test_a_problem_reads_like_the_documented_one() -> None:
    first = SMALL.demonstrations()[0].fields["messages"]
    assert [message["role"] for message in first] == ["user", "assistant"]
    shape = r"(\w+) has \d (\w+)\.( \1 \w+ \d\.){2,3} How many \2\?"
    assert re.fullmatch(shape, first[0]["content"])


def test_every_answer_is_what_the_words_say() -> None:
    for problem in SMALL.problems():
        assert int(problem.answer) == answer_of(problem.question)


def test_working_ends_in_the_boxed_answer_and_each_line_is_true() -> None:
    for row in Arithmetic(train=300, worked=1.0).demonstrations():
        question, solution = (message["content"] for message in row.fields["messages"])
        *lines, box = solution.split("\n")
        assert len(lines) in (2, 3)
        for line in lines:
            left, right = line.split("=")
            assert eval(left) == int(right) >= 1
        assert box == f"\\boxed{{{answer_of(question)}}}" and lines[-1].endswith(f"={answer_of(question)}")


@pytest.mark.parametrize("worked", [0.0, 0.7, 1.0])
def test_worked_is_the_share_of_demonstrations_that_show_their_working(worked: float) -> None:
    shown = [
        "\n" in row.fields["messages"][1]["content"] for row in Arithmetic(worked=worked).demonstrations()[:10_000]
    ]
    assert sum(shown) / len(shown) == pytest.approx(worked, abs=0.015)


def test_the_questions_do_not_depend_on_how_many_show_their_working() -> None:
    questions = [[row.fields["messages"][0] for row in Arithmetic(worked=w).demonstrations()] for w in (0.7, 1.0)]
    assert questions[0] == questions[1]


def test_no_question_is_in_two_splits_or_twice_in_one() -> None:
    splits = draw_splits(40_000, 300, 1_000, 0)
    questions = [item.question for split in splits for item in split]
    assert [len(split) for split in splits] == [1_000, 300, 40_000]
    assert len(set(questions)) == len(questions)


def test_the_test_problems_stay_when_the_training_set_grows() -> None:
    few, many = (Arithmetic(train=n).problems() for n in (100, 40_000))
    assert [p.question for p in few] == [p.question for p in many]
    assert sum(p.subset == "seen" for p in few) < sum(p.subset == "seen" for p in many)


def test_a_problem_is_seen_when_training_holds_its_numbers_and_operations() -> None:
    chains = {item.chain for item in SMALL._splits().train}
    for item, problem in zip(SMALL._splits().test, SMALL.problems(), strict=True):
        assert problem.subset == ("seen" if item.chain in chains else "unseen")
    assert {problem.subset for problem in SMALL.problems()} == {"seen", "unseen"}


def test_the_same_seed_gives_the_same_problems_everywhere() -> None:
    assert [item.question for item in draw_splits(1, 1, 1, 0).test] == [
        "Sam has 7 books. Sam wins 6. Sam buys 1. How many books?"
    ]
    assert draw_splits(1, 1, 1, 1).test != draw_splits(1, 1, 1, 0).test


def test_the_vocabulary_is_small_and_begins_with_the_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 373
    assert tokenizer.convert_ids_to_tokens(range(4)) == list(SPECIAL)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 2, 3)
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3}


def test_digits_stand_alone_and_words_are_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = [tokenizer.decode([i]) for i in tokenizer("Tom buys 12 pens.\n7+5=12")["input_ids"]]
    assert tokens == ["Tom", " buys", " ", "1", "2", " pens", ".", "\n", "7", "+", "5", "=", "1", "2"]


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n\t", "Zürich 東京 🦜\x00\x7f", "a  b   c ", "<|im_start|>user\nx<|im_end|>", "it's , . ?", "\r\n"],
)
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_training_the_tokenizer_twice_gives_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    again = train_tokenizer(islice(Arithmetic().texts(), 2000))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_tokenizer_is_the_same_after_saving(tokenizer: PreTrainedTokenizerBase, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = SMALL.demonstrations()[0].fields["messages"]
    both = [t.apply_chat_template(messages)["input_ids"] for t in (tokenizer, loaded)]
    assert both[0] == both[1]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.mask_token_id) == (0, 2, 3)


def test_more_problems_than_there_are_are_not_looked_for():
    with pytest.raises(DirlError, match=r"arithmetic has no 2,147,523,948 problems: give its splits 1,000,000"):
        Arithmetic(test=2**31).problems()
