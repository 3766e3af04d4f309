"""Which pages of the KV cache each slot's sequence lies in, as numbers on the host.

A page has room for some neighbouring tokens of a sequence, so that memory follows the tokens that are there. Sequences
that begin with the same prompt share the pages that it fills; a shared page is never written.

Shapes: S slots, P pages of the longest sequence.
"""

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class PageTable:
    """The pages of each slot, and those that are free.

    length: tokens of the longest sequence. size: tokens of a page. count: pages that there are, at least P, so that any
    sequence fits alone; None for as many as all slots may take.
    """

    def __init__(self, slots: int, length: int, size: int, count: int | None = None) -> None:
        self.longest = -(-length // size)  # P
        self.size = size
        self.count = slots * self.longest if count is None else count
        self.rows = np.zeros((slots, self.longest), np.int64)  # page numbers, of which the first `held` count
        self.clear()

    def clear(self) -> None:
        """Make all pages free."""
        self.held = np.zeros(len(self.rows), np.int64)  # (S,) pages of each slot, its own or shared
        self.users = np.zeros(self.count, np.int64)  # slots that have each page
        self.free = list(reversed(range(self.count)))
        self.changed = True  # set with every change of `rows`; whoever copies these resets it

    def pages_of(self, tokens: int) -> int:
        """The number of pages that so many tokens take."""
        return -(-tokens // self.size)

    def extend(self, slot: int, tokens: int) -> bool:
        """Let a slot have pages for so many tokens; False, and nothing changed, where too few are free."""
        held = int(self.held[slot])
        missing = self.pages_of(tokens) - held
        if missing > len(self.free):
            return False
        for column in range(held, held + missing):
            page = self.free.pop()
            self.rows[slot, column] = page
            self.users[page] = 1
            self.changed = True
        self.held[slot] = max(held, held + missing)
        return True

    def share(self, source: int, slot: int, tokens: int) -> None:
        """Let a slot that has no pages begin with those that the first `tokens` of another fill."""
        whole = tokens // self.size
        pages = self.rows[source, :whole]
        self.rows[slot, :whole] = pages
        self.users[pages] += 1
        self.held[slot] = whole
        self.changed = True

    def trim(self, slot: int, tokens: int) -> None:
        """Take back a slot's pages behind those that its first `tokens` lie in."""
        for column in range(int(self.held[slot]) - 1, self.pages_of(tokens) - 1, -1):
            page = int(self.rows[slot, column])
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
            self.held[slot] = column
