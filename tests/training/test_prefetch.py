"""What the next step learns from, made while this one is learned from."""

from threading import Event

import pytest

from dirl_cli.training.prefetch import Prefetched


def test_each_step_gets_its_own_wherever_a_run_begins():
    for first in (0, 3):
        prefetched = Prefetched(lambda step: step * step, steps=6)
        assert [prefetched[step] for step in range(first, 6)] == [step * step for step in range(first, 6)]


def test_the_next_is_made_while_a_step_goes_on_and_none_after_the_last():
    made = [Event() for _ in range(3)]

    def make(step: int) -> int:
        made[step].set()
        return step

    prefetched = Prefetched(make, steps=2)
    assert prefetched[0] == 0
    assert made[1].wait(60)
    assert prefetched[1] == 1
    assert not prefetched.begun and not made[2].is_set()


def test_where_it_is_not_enabled_nothing_is_made_before_it_is_asked_for():
    asked: list[int] = []
    prefetched = Prefetched(asked.append, steps=3, enabled=False)
    prefetched[0]
    assert asked == [0] and not prefetched.begun


def test_what_fails_fails_at_its_own_step():
    def make(step: int) -> int:
        return 1 // (1 - step)

    prefetched = Prefetched(make, steps=3)
    assert prefetched[0] == 1
    with pytest.raises(ZeroDivisionError):
        prefetched[1]
