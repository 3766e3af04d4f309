"""How many answers are sampled at once from few pages of keys and values, and what is computed twice for it.

The scheduler alone, with a forward that computes nothing: two denoising steps a block, answers of random lengths.

python -m benchmarks.pages              # less than a minute on one core
"""

import time
from types import SimpleNamespace

import numpy as np

from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.pages import PageTable
from dirl_cli.rollout.requests import make_requests
from dirl_cli.rollout.scheduler import Scheduler
from dirl_cli.rollout.sequences import SequencePart
from dirl_cli.types import Decoding

BLOCK, PAGE, STEPS, STOP = 4, 32, 2, 1
SLOTS, PROBLEMS, GROUP, PROMPT, LONGEST = 256, 64, 16, 200, 8192
MEAN = 2000  # tokens of an answer


class EmptyForward:
    """See `forward.Forward`: ends each answer after as many tokens as it is to have. lengths: these, by key."""

    def __init__(self, lm, pages: int, lengths: dict[int, int]) -> None:
        self.lm = lm
        self.decoder = SimpleNamespace(head=None)
        self.lengths = lengths
        self.pages = PageTable(SLOTS, PROMPT + LONGEST, PAGE, pages)
        self.cache = self.sequences = self
        self.running: list[int] = []  # answers in each forward
        self.used: list[int] = []  # pages
        self.tokens = 0  # in all forwards
        self.seconds = 0.0

    def open(self, slot, prompt_ids, hint) -> None: ...
    def copy_page(self, source, target, tokens) -> None: ...

    def fetch(self, slots, begin, end):
        return [SequencePart([0] * n, [STEPS] * n, [0.0] * n) for n in (end - begin).tolist()]

    def step(self, blocks, cached, count, unmask, reads=True):
        began = time.process_time()
        self.running.append(blocks.shape[1])
        self.used.append(self.pages.count - len(self.pages.free))
        self.tokens += int((blocks[1] + BLOCK - cached).sum())
        tokens = np.full((blocks.shape[1], BLOCK), -1)
        for i, (_, start, step, key) in enumerate(blocks.T.tolist()):
            if step == STEPS:
                tokens[i] = STOP if start + BLOCK - PROMPT >= self.lengths[key] else 9
        self.seconds += time.process_time() - began
        return tokens


def main() -> None:
    print(f"{PROBLEMS} × {GROUP} answers of at most {LONGEST:,} tokens to prompts of {PROMPT}, {SLOTS} slots\n")
    print(
        "| lengths | pages | room for the longest | at once | of all pages in use | stalled | tokens computed | host |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for shape, name in ((1, "exponential"), (4, "gamma, shape 4")):
        for pages in (SLOTS * (PROMPT + LONGEST) // PAGE + 1, 10_600, 5_000):
            compare(name, shape, pages)


def compare(name: str, shape: int, pages: int) -> None:
    rng = np.random.default_rng(0)
    lm = Tiny(max_position_embeddings=2 * LONGEST).load()
    decoding = Decoding(max_new_tokens=LONGEST, stop_token_ids=(STOP,), temperature=1.0)
    requests = make_requests([[i + 4] * PROMPT for i in range(PROBLEMS)], GROUP, decoding, None, None)
    lengths = {}
    for request in requests:
        drawn = min(LONGEST, rng.gamma(shape, MEAN / shape))
        lengths[request.key] = max(-(-drawn // BLOCK), 1) * BLOCK
    forward = EmptyForward(lm, pages, lengths)
    scheduler = Scheduler(forward, SLOTS)
    stalled = []
    stall = scheduler._stall
    scheduler._stall = lambda slot: (stalled.append(slot), stall(slot))

    began = time.process_time()
    full = 0  # forwards while there were requests for every slot
    while requests or scheduler.running:
        while requests and scheduler.free:
            scheduler.add(requests.pop(0))
        if requests:
            full = len(forward.running) + 1
        list(scheduler.step())
    seconds = time.process_time() - began - forward.seconds

    least = sum(lengths.values()) * (STEPS + 1) + PROBLEMS * PROMPT  # each denoised so often, and cached
    print(
        f"| {name} | {pages:,} | {pages * PAGE // (PROMPT + LONGEST)} | {np.mean(forward.running[:full]):.0f}"
        f" | {np.mean(forward.used[:full]) / pages:.2f} | {len(stalled)} | {forward.tokens / least:.3f}×"
        f" | {1e3 * seconds / len(forward.running):.2f} ms |",
        flush=True,
    )


if __name__ == "__main__":
    main()
