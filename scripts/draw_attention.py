"""Draw docs/attention.png from the rule itself: who sees whom in inference, fine-tuning and reinforcement learning."""

from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dirl_cli.diffusion.layout import Rows, lay_out, pack
from dirl_cli.diffusion.states import trajectory_strip
from dirl_cli.models.attention import dense_mask
from dirl_cli.types import Trajectory

BLOCK, MASK = 4, 99
PROMPT, ANSWER = list(range(4)), list(range(4, 12))
INK, EMPTY, CLEAN, OWN = "#33373d", "#f1f3f5", "#9db8d9", "#2f6db5"


def main() -> None:
    ids = torch.tensor(PROMPT + ANSWER)
    hidden = torch.tensor([[0] * 4 + [0, 1, 1, 0] + [1, 0, 1, 1]], dtype=torch.bool)
    trace = Trajectory(PROMPT, ANSWER, [1, 2, 1, 2, 1, 1, 2, 3], [0.0] * 8, "length")
    strips = lay_out(ids, hidden, hidden, hidden.float(), BLOCK, MASK), trajectory_strip(trace, BLOCK, MASK)
    pictures = {
        "Inference: one clean copy": clean_only(ids),
        "Fine-tuning: and one noised view": pack(strips[:1], 99, BLOCK, 0),
        "Reinforcement: one view per denoising step": pack(strips[1:], 99, BLOCK, 0),
    }
    figure = Figure(figsize=(15, 5.6), layout="constrained", facecolor="white")
    for axes, (title, rows) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        draw(axes, title, rows)
    figure.savefig(Path(__file__).parents[1] / "docs" / "attention.png", dpi=110)


def clean_only(ids: torch.Tensor) -> Rows:
    zeros = torch.zeros(1, len(ids), dtype=torch.long)
    nothing = zeros[0, :0]
    position = torch.arange(len(ids))[None]
    return Rows(ids[None], zeros, zeros, position, zeros, nothing, nothing, nothing, nothing.float(), BLOCK)


def draw(axes, title: str, rows: Rows) -> None:
    c = rows.coordinates
    sees = dense_mask(c)[0, 0]
    own = (c.block[0][:, None] == c.block[0]) & (c.view[0][:, None] == c.view[0])
    axes.imshow((sees.int() + (sees & own).int()).numpy(), cmap=ListedColormap([EMPTY, CLEAN, OWN]), vmin=0, vmax=2)
    n = len(sees)
    labels = [f"{int(b)}{'′' * int(v)}" for b, v in zip(c.block[0], c.view[0], strict=True)]
    starts = [i for i in range(n) if i == 0 or labels[i] != labels[i - 1]]
    middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], n], strict=True)]
    names = ["prompt" if labels[a] == "0" else f"block {labels[a]}" for a in starts]
    axes.set_yticks(middles, names, fontsize=9, color=INK)
    axes.set_xticks(middles, names, fontsize=9, color=INK, rotation=40, ha="left")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for edge in range(n + 1):
        width = 2.5 if edge in starts or edge == n else 0.6
        axes.axhline(edge - 0.5, color="white", linewidth=width)
        axes.axvline(edge - 0.5, color="white", linewidth=width)
    masked = [i for i in range(n) if int(rows.token_ids[0, i]) == MASK]
    axes.scatter([-0.98] * len(masked), masked, marker="s", s=14, color="#d9632a", clip_on=False)
    axes.set_title(title, fontsize=12, color=INK, pad=14, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    main()
