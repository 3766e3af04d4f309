"""Queries by number, each as long as one of its answers is open."""

from collections.abc import Iterable
from threading import Lock

from dirl_cli.serving.engine import Query


class OpenQueries:
    """Queries by number, each as long as one of its answers is open."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.queries: dict[int, tuple[Query, set[int]]] = {}  # with the samples that are open

    def add(self, number: int, query: Query) -> None:
        with self.lock:
            self.queries[number] = (query, set(query.samples))

    def get(self, number: int) -> Query | None:
        with self.lock:
            query, _ = self.queries.get(number, (None, None))
            return query

    def close(self, number: int, samples: Iterable[int]) -> None:
        with self.lock:
            if number in self.queries:
                _, is_open = self.queries[number]
                is_open.difference_update(samples)
                if not is_open:
                    del self.queries[number]

    def take_all(self) -> list[tuple[int, Query, set[int]]]:
        with self.lock:
            taken = [(number, query, samples) for number, (query, samples) in self.queries.items()]
            self.queries.clear()
        return taken
