"""An answer's picture: where its tokens stand, and files that others can open."""

from io import BytesIO
from xml.etree import ElementTree

import pytest
from PIL import Image

from dirl_cli.viewer.picture import (
    CHARACTER,
    COLUMNS,
    EDGE,
    GROUND,
    INK,
    LINE,
    MASKED,
    SCALE,
    colour_of,
    draw_frames,
    gif,
    svg,
    token_cells,
)

SVG = "{http://www.w3.org/2000/svg}"


def answer(texts: list[str], steps: list[int], order: list[int], offset: int = 0, length: int | None = None) -> dict:
    return {
        "tokens": list(range(len(texts))),
        "steps": steps,
        "order": order,
        "offset": offset,
        "block_size": 2,
        "length": len(texts) if length is None else length,
    }


def test_blocks_stand_a_character_apart_and_a_line_break_ends_the_line():
    texts = ["ab", "c\n", "d", "e"]
    cells = token_cells(answer(texts, [1, 2, 1, 1], [1, 2, 3, 3], offset=1), texts)
    assert [(cell.text, cell.line, cell.column, cell.block) for cell in cells] == [
        ("ab", 0, 0, 0),
        ("c↵", 0, 3, 1),
        ("d", 1, 0, 1),
        ("e", 1, 2, 2),
    ]


def test_a_full_line_is_broken_and_wide_letters_count_twice():
    texts = ["x" * 100, "漢字", "y" * 30]
    cells = token_cells(answer(texts, [1, 1, 1], [1, 1, 2]), texts)
    assert max(cell.column + cell.width for cell in cells) <= COLUMNS
    assert "".join(cell.text for cell in cells) == "".join(texts)
    assert [cell.width for cell in cells if cell.text == "漢字"] == [4]


def test_the_tail_is_left_out_and_the_stop_token_is_not():
    texts = ["four", "<end>", "<end>"]
    assert [cell.text for cell in token_cells(answer(texts, [1, 1, 1], [1, 1, 1], length=1), texts)] == [
        "four",
        "<end>",
    ]


@pytest.mark.parametrize(
    ("step", "last", "colour"), [(1, 4, SCALE[0]), (4, 4, SCALE[2]), (2, 3, SCALE[1]), (1, 1, SCALE[0])]
)
def test_the_scale_goes_from_the_first_step_to_the_last(step, last, colour):
    assert colour_of(step, last) == colour


def test_hostile_text_is_only_text_in_the_svg():
    texts = ["</text><script>alert(1)</script>", "&amp;\x00\x1b\ud800\u202e", "held"]
    root = ElementTree.fromstring(svg(answer(texts, [1, 2, 0], [1, 2, 0]), texts).encode())
    assert not list(root.iter(f"{SVG}script"))
    shown = "".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert "</text><script>alert(1)</script>" in shown and "&amp;␀␛?�" in shown


def test_the_gif_has_a_frame_before_the_first_forward_and_one_after_each():
    texts = ["a", "b", "c"]
    image = Image.open(BytesIO(gif(answer(texts, [1, 2, 1], [1, 2, 3]), texts)))
    assert (image.n_frames, image.info["loop"]) == (4, 0)
    before = image.convert("RGB").tobytes()
    image.seek(3)
    assert image.convert("RGB").tobytes() != before


def test_a_long_answer_has_no_more_frames_than_may_be(monkeypatch):
    monkeypatch.setattr("dirl_cli.viewer.picture.MOST_FRAMES", 4)
    texts = ["a"] * 10
    image = Image.open(BytesIO(gif(answer(texts, [1, 2] * 5, list(range(1, 11))), texts)))
    assert image.n_frames == 5  # after forwards 0, 3, 6, 9 and 10


def test_a_frame_masks_what_is_still_to_come_and_rings_what_is_new():
    texts = ["a", "b", "c", "d"]
    cells = token_cells(answer(texts, [0, 1, 2, 1], [0, 1, 2, 3]), texts)
    frames = [frame.convert("RGB") for frame in draw_frames(cells, [0, 2, 3])]

    def seen(frame, cell):
        """The colour in the upper left of a token, and of its edge."""
        left, top = 2 * (EDGE + cell.column * CHARACTER), 2 * (EDGE + cell.line * LINE)
        return tuple(
            "#{:02x}{:02x}{:02x}".format(*frame.getpixel(place)) for place in ((left + 4, top + 5), (left + 8, top))
        )

    low, high = colour_of(1, 2), colour_of(2, 2)
    assert [seen(frames[0], cell) for cell in cells] == [(GROUND, GROUND)] + [(MASKED, MASKED)] * 3
    assert [seen(frames[1], cell) for cell in cells] == [(GROUND, GROUND), (low, INK), (high, INK), (MASKED, MASKED)]
    assert [seen(frames[2], cell) for cell in cells] == [(GROUND, GROUND), (low, low), (high, high), (low, low)]
