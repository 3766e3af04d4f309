"""The text of an answer block by block: what is handed out together is the whole text, and none of it is taken back."""

import pytest

from dirl_cli.serving.growing_text import WINDOW, GrowingText
from tests.helpers.served import speaking_lm

STOP = 1  # <|im_end|> of the embedded tokenizer is another; any number will do


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids, skip_special_tokens=False):
        return bytes(token_ids).decode(errors="replace")


def grown(blocks, stops=(), max_tokens=100):
    """What each block adds, and the text's end."""
    text = GrowingText(Bytes(), (STOP,), stops, max_tokens)
    added = [text.grow(block, is_last=block is blocks[-1]) for block in blocks]
    assert "".join(added) == text.text
    return added, text.finish_reason


def test_a_letter_is_handed_out_once_all_its_bytes_are_there():
    euro = list("€".encode())
    assert grown([[65, *euro[:2]], [*euro[2:], 66]]) == (["A", "€B"], "length")
    assert grown([[65, *euro[:2]]]) == (["A\ufffd"], "length"), "what never becomes a letter is shown at the end"


@pytest.mark.parametrize(
    ("blocks", "added", "reason"),
    [
        (["ab", "cd"], ["ab", "cd"], "length"),
        (["aE", "ND"], ["a", ""], "stop"),
        (["aE", "Nx"], ["a", "ENx"], "length"),
        (["aEE", "NDb"], ["aE", ""], "stop"),
        (["a\n", "\nb"], ["a", ""], "stop"),
    ],
)
def test_a_stop_string_is_cut_off_also_across_blocks_and_what_only_begins_like_one_is_not(blocks, added, reason):
    assert grown([list(block.encode()) for block in blocks], ["END", "\n\n"]) == (added, reason)


def test_a_stop_string_is_cut_off_also_where_a_letter_of_it_is_split_over_blocks():
    letter = list("问".encode())
    assert grown([[97, 10, *letter[:1]], [*letter[1:], 98]], ["\n问"]) == (["a", ""], "stop")
    assert grown([[97, 10, *letter[:1]], [*list("闻".encode())[1:], 98]], ["\n问"])[0][0] == "a"


def test_a_stop_string_is_looked_for_in_what_is_not_handed_out_yet():
    text = GrowingText(Bytes(), (), ("ab",), 1000)
    looked = []

    for letter in b"xyza":
        text.grow([letter], is_last=False)
        looked.append(len(text.text) - text.sent)
    assert looked == [0, 0, 0, 1]
    assert text.grow(list(b"b!"), is_last=False) == "" and text.text == "xyz"


def test_a_stop_token_and_the_most_tokens_end_it():
    assert grown([[65, 66], [67, STOP, 68]]) == (["AB", "C"], "stop")
    assert grown([[65, 66], [67, 68]], max_tokens=3) == (["AB", "C"], "length")
    assert grown([[65, 66], [67, STOP]], max_tokens=3) == (["AB", "C"], "length")


def test_the_embedded_tokenizers_text_grows_as_it_is_decoded_at_once():
    tokenizer = speaking_lm().require_tokenizer()
    ids = tokenizer("Tom has 7 pens, and buys 5. How many? é €")["input_ids"]
    text = GrowingText(tokenizer, (), (), 100)
    pieces = [text.grow(ids[i : i + 3], is_last=i + 3 >= len(ids)) for i in range(0, len(ids), 3)]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_of_a_long_answer_few_tokens_are_decoded_with_each_block(block_size):
    """Letters of two and three bytes lie across blocks and across what settles."""
    ids = list(("é€x" * 200).encode())
    decoded = []

    class Counting(Bytes):
        def decode(self, token_ids, skip_special_tokens=False):
            decoded.append(len(token_ids))
            return super().decode(token_ids)

    text = GrowingText(Counting(), (), ("never",), 10_000)
    blocks = [ids[i : i + block_size] for i in range(0, len(ids), block_size)]
    added = [text.grow(block, is_last=block is blocks[-1]) for block in blocks]
    assert "".join(added) == text.text == "é€x" * 200
    assert max(decoded) <= 2 * WINDOW + block_size + 2
