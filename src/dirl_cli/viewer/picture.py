"""One answer as a picture for papers and slides: where its tokens stand, as SVG by step and as GIF by forward."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

from dirl_cli.text import escape_controls
from dirl_cli.types import HELD

COLUMNS = 72  # characters of a line
MOST_FRAMES = 100  # of a GIF; of a longer answer each shows several forwards
FRAME, LAST_FRAME = 250, 3000  # milliseconds
SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
# Characters that turn the direction of the text around them, or that nobody sees.
UNSEEN = dict.fromkeys([*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF], "�")

# Pixels, before a GIF doubles them.
CHARACTER, LINE, TOKEN, FONT, SMALL, EDGE = 9, 38, 20, 15, 9, 16
STEPS_LEGEND, FORWARD_LEGEND = 420, 180  # widths
SCALE = ("#d3e7fb", "#cbe8c3", "#f6b65a")  # of the first step, the middle and the last
INK, FAINT, MASKED, GROUND = "#1d2024", "#5f666e", "#dad7cf", "#ffffff"


@dataclass(frozen=True)
class Cell:
    """A token, or the part of one that is on a line. column, width: in characters."""

    text: str
    line: int
    column: int
    width: int
    step: int
    order: int
    block: int


def token_cells(answer: dict[str, Any], texts: Sequence[str]) -> list[Cell]:
    """Lay out the tokens of an answer of the payload, up to its stop token, blocks a character apart."""
    cells: list[Cell] = []
    line = column = 0
    before = None  # the block of the token before
    for i, place in enumerate(answer["tokens"][: answer["length"] + 1]):
        block = (answer["offset"] + i) // answer["block_size"]
        if column and block != before:
            column += 1
        before = block
        for part in parts_of(texts[place]):
            width = sum(map(width_of, part))
            if column and column + width > COLUMNS:
                line, column = line + 1, 0
            cells.append(Cell(part, line, column, width, answer["steps"][i], answer["order"][i], block))
            column += width
            if part.endswith(SIGNS["\n"]):
                line, column = line + 1, 0
    return cells


def parts_of(text: str) -> Iterator[str]:
    """A token's text with signs for what cannot be seen, cut behind line breaks and where a line is full."""
    for line in text.splitlines(keepends=True) or ["·"]:
        shown = escape_controls("".join(SIGNS.get(letter, letter) for letter in line)).translate(UNSEEN)
        shown = shown.encode("utf-8", "replace").decode()
        half = COLUMNS // 2  # of characters that may be two columns wide
        for first in range(0, len(shown), half):
            yield shown[first : first + half]


def width_of(letter: str) -> int:
    """Columns that a letter takes in a font of equal widths."""
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def colour_of(step: int, last: int) -> str:
    """The colour of a reveal step on the scale, as #rrggbb."""
    share = (max(step, 1) - 1) / max(1, last - 1) * (len(SCALE) - 1)
    left = min(int(share), len(SCALE) - 2)
    channels = []
    for at in (1, 3, 5):
        low, high = int(SCALE[left][at : at + 2], 16), int(SCALE[left + 1][at : at + 2], 16)
        channels.append(round(low + (high - low) * (share - left)))
    return "#{:02x}{:02x}{:02x}".format(*channels)


def size_of(cells: Sequence[Cell], legend: int) -> tuple[int, int]:
    """Width and height of the picture in pixels, with a line for a legend of some width."""
    width = max(cell.column + cell.width for cell in cells) * CHARACTER
    height = (cells[-1].line + 2) * LINE
    return max(width, legend) + 2 * EDGE, height + EDGE


def svg(answer: dict[str, Any], texts: Sequence[str]) -> str:
    """The whole answer, coloured by denoising step, whose number is under each token; a line under each block."""
    cells = token_cells(answer, texts)
    last = max(cell.step for cell in cells)
    width, height = size_of(cells, 2 * last * CHARACTER + STEPS_LEGEND)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{FONT}">',
        "<title>An answer by the denoising step of its block that revealed each token</title>",
        f'<rect width="{width}" height="{height}" fill="{GROUND}"/>',
    ]
    for cell in cells:
        x, y, wide = EDGE + cell.column * CHARACTER, EDGE + cell.line * LINE, cell.width * CHARACTER
        number = "·" if cell.step == HELD else str(cell.step)
        size = SMALL if len(number) * SMALL * 0.6 <= wide else 0.75 * SMALL
        lines += [
            f'<rect x="{x + 0.5}" y="{y}" width="{max(1, wide - 1)}" height="{TOKEN}" rx="2"'
            f' fill="{GROUND if cell.step == HELD else colour_of(cell.step, last)}"/>',
            f'<text x="{x}" y="{y + FONT}" textLength="{wide}" lengthAdjust="spacingAndGlyphs" fill="{INK}"'
            f' xml:space="preserve">{escape(cell.text)}</text>',
            f'<text x="{x + wide / 2}" y="{y + TOKEN + SMALL}" font-size="{size}" text-anchor="middle"'
            f' fill="{FAINT}">{number}</text>',
        ]
    for x, y, wide in block_lines(cells):
        lines.append(f'<path d="M{x} {y}h{wide}" stroke="{FAINT}" stroke-width="1.5"/>')

    y = height - EDGE
    for step in range(1, last + 1):
        x = EDGE + 2 * (step - 1) * CHARACTER
        lines.append(
            f'<rect x="{x}" y="{y - SMALL}" width="{2 * CHARACTER}" height="{SMALL + 2}"'
            f' fill="{colour_of(step, last)}"/>'
        )
    x = EDGE + 2 * last * CHARACTER + 6
    legend = f"denoising steps 1 to {last}; a line under each block"
    if any(cell.step == HELD for cell in cells):
        legend += "; · held from the start"
    lines.append(f'<text x="{x}" y="{y}" font-size="{SMALL}" fill="{FAINT}">{legend}</text>')
    return "\n".join([*lines, "</svg>", ""])


def block_lines(cells: Sequence[Cell]) -> Iterator[tuple[int, int, int]]:
    """Where to draw the lines under blocks: left, height and length of each in pixels."""
    ends: dict[tuple[int, int], list[int]] = {}  # of each block on each line, in characters
    for cell in cells:
        first, _ = ends.setdefault((cell.line, cell.block), [cell.column, 0])
        ends[cell.line, cell.block] = [first, cell.column + cell.width]
    for (line, _), (first, end) in ends.items():
        yield EDGE + first * CHARACTER + 1, EDGE + line * LINE + LINE - 6, (end - first) * CHARACTER - 2


def gif(answer: dict[str, Any], texts: Sequence[str]) -> bytes:
    """The answer as its blocks fill, a frame a forward, the last one longer."""
    cells = token_cells(answer, texts)
    last = max(cell.order for cell in cells)
    stride = -(-last // MOST_FRAMES)
    moments = [*range(0, last, stride), last]
    frames = list(draw_frames(cells, moments))
    file = BytesIO()
    durations = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()


def draw_frames(cells: Sequence[Cell], moments: Sequence[int]) -> Iterator[Image.Image]:
    """The answer after each of some forwards, of which the first is 0: before any."""
    width, height = size_of(cells, FORWARD_LEGEND)
    canvas = Image.new("RGB", (2 * width, 2 * height), GROUND)
    draw = ImageDraw.Draw(canvas)
    steps = max(cell.step for cell in cells)
    palette = palette_of(steps)
    for x, y, wide in block_lines(cells):
        draw.line((2 * x, 2 * y, 2 * (x + wide), 2 * y), FAINT, 3)

    # A frame differs from the one before in what is new now and in what was new then: no more is drawn.
    changing = list(cells)
    before = -1
    for moment, following in zip(moments, [*moments[1:], moments[-1]], strict=True):
        for cell in changing:
            is_new = max(0, before) < cell.order <= moment < moments[-1]
            draw_cell(draw, cell, colour_of(cell.step, steps), cell.order > moment, is_new)
        legend = f"after forward {moment} of {moments[-1]}"
        y = 2 * (height - EDGE)
        draw.rectangle((0, y - LINE, 2 * width, 2 * height), GROUND)
        draw.text((2 * EDGE, y), legend, FAINT, font_of(2 * SMALL + 4), anchor="ls")
        yield canvas.quantize(palette=palette, dither=Image.Dither.NONE)

        changing = [cell for cell in cells if before < cell.order <= following]
        before = moment


def draw_cell(draw: ImageDraw.ImageDraw, cell: Cell, colour: str, is_masked: bool, is_new: bool) -> None:
    """Draw a token over whatever stands in its place. colour: that of its step."""
    x, y, wide = EDGE + cell.column * CHARACTER, EDGE + cell.line * LINE, cell.width * CHARACTER
    box = (2 * x + 1, 2 * y, 2 * (x + wide) - 2, 2 * (y + TOKEN))
    if is_masked:
        draw.rounded_rectangle(box, 4, fill=MASKED)
        return
    fill = GROUND if cell.step == HELD else colour
    draw.rounded_rectangle(box, 4, fill=fill, outline=INK if is_new else None, width=2)
    draw.text((2 * x, 2 * (y + FONT)), cell.text, INK, font_of(2 * FONT), anchor="ls")


def palette_of(steps: int) -> Image.Image:
    """The colours of all frames: each that stands behind a letter, and its shades toward the ink."""
    shown = {colour_of(round(1 + (steps - 1) * k / 39), steps) for k in range(40)}
    colours = []
    for behind in [GROUND, MASKED, *sorted(shown)]:
        for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            for low, high in zip(ImageColor.getrgb(behind), ImageColor.getrgb(INK), strict=True):
                colours.append(round(low + (high - low) * share))
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours)
    return palette


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font of equal widths that comes with matplotlib."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), size)
