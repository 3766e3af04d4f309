"""The built-in rewards, each a formula over one answer.

A pair of values is what the shortest and the longest answer get, or the slowest and the fastest; `between` joins them.
"""

from math import cos, pi

from dirl_cli.ranges import Count, Finite
from dirl_cli.reward.answer import Answer, Reward
from dirl_cli.reward.boxed import last_boxed

Ends = tuple[Finite, Finite]


def between(ends: Ends, t: float, end: float) -> float:
    """From ends[0] at t = 0 to ends[1] at t = end and beyond, along half a cosine: a + (b - a)(1 - cos(πt/end))/2."""
    first, last = ends
    share = min(t / end, 1.0) if end else 0.0
    return first + (last - first) * (1 - cos(pi * share)) / 2


def steps_ahead(answer: Answer) -> float:
    """s = clip(tokens per denoising step - 1, 0, block_size - 1)."""
    return min(max(answer.tokens_per_step - 1, 0.0), answer.block_size - 1)


def accuracy(answer: Answer) -> float:
    """1 if right, else 0; a truncated answer is never right."""
    return float(answer.right)


def binary(answer: Answer) -> float:
    """1 if right, else -1."""
    return 1.0 if answer.right else -1.0


def boxed(answer: Answer, *, value: Finite = 0.1) -> float:
    r"""`value` if there is a closed `\boxed{}`, else 0."""
    return value if last_boxed(answer.completion) is not None else 0.0


def format(answer: Answer, *, opened: bool = False) -> float:
    """1 if the completion is `<think>…</think>…`, each tag once and something after them, else 0.

    opened: the prompt already ends in `<think>`, so that the completion does not begin with it.
    """
    text = ("<think>" if opened else "") + answer.completion.strip()
    once = text.count("<think>") == text.count("</think>") == 1
    return float(once and text.startswith("<think>") and not text.endswith("</think>"))


def cosine(
    answer: Answer,
    *,
    right: Ends = (1.0, 0.5),
    wrong: Ends = (-0.5, 0.0),
    truncated: Finite = -0.5,
) -> float:
    """Right: 1 → 0.5, wrong: -0.5 → 0 as the length goes 0 → max_new_tokens; truncated: -0.5 (arXiv 2502.03373)."""
    if answer.truncated:
        return truncated
    return between(right if answer.right else wrong, answer.tokens, answer.max_new_tokens)


def repetition(answer: Answer, *, n: Count = 3) -> float:
    """-(1 - distinct/all n-grams of words), in any case of letters; 0 for fewer than n words."""
    words = answer.completion.lower().split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def soft_overlong(answer: Answer, *, cache: Count) -> float:
    """min(-(length - (max_new_tokens - cache)) / cache, 0): a ramp over the last `cache` tokens (DAPO, eq. 13)."""
    return min((answer.max_new_tokens - cache - answer.tokens) / cache, 0.0)


def speed(answer: Answer, *, right: Ends = (0.5, 1.0), wrong: Ends = (0.0, -0.5)) -> float:
    """Right: 0.5 → 1, wrong: 0 → -0.5 as a step reveals 1 → block_size tokens."""
    return between(right if answer.right else wrong, steps_ahead(answer), answer.block_size - 1)


def speed_penalty(answer: Answer, *, right: Finite = 0.5, wrong: Ends = (0.0, -0.5)) -> float:
    """Right: 0.5 at any speed; wrong: as `speed`, so that only haste which costs the answer is punished."""
    return speed(answer, right=(right, right), wrong=wrong)


def length(answer: Answer) -> float:
    """λ = 0.5 - length/max_new_tokens if right, else min(λ, 0).

    Kimi k1.5's length reward (arXiv 2501.12599, §2.3.3) with 0 and max_new_tokens in place of the shortest and
    longest answer of the group, so that it is a function of one answer.
    """
    share = 0.5 - min(answer.tokens / answer.max_new_tokens, 1.0)
    return share if answer.right else min(share, 0.0)


BUILT_IN: dict[str, Reward] = {
    f.__name__: f
    for f in (
        *(accuracy, binary, boxed, format, cosine, repetition),
        *(soft_overlong, speed, speed_penalty, length),
    )
}
