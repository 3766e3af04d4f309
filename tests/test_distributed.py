"""Problems shared out so that all processes are done at about the same time."""

from dirl_cli.distributed import split_by_cost


def loads(costs, shares):
    return [sum(costs[place] for place in share) for share in shares]


def test_a_long_problem_is_weighed_against_many_short_ones():
    assert split_by_cost([1, 9, 1, 1, 4, 2], 2) == [[1], [0, 2, 3, 4, 5]]


def test_skewed_problems_keep_no_process_waiting_where_every_second_one_would():
    costs = [100 if place % 2 == 0 else 10 for place in range(8)]  # dealt out in turn, one process gets all long ones
    assert loads(costs, [range(0, 8, 2), range(1, 8, 2)]) == [400, 40]
    assert loads(costs, split_by_cost(costs, 2)) == [220, 220]


def test_fewer_problems_than_processes_leave_some_without_any():
    assert split_by_cost([5, 3], 4) == [[0], [1], [], []]
    assert split_by_cost([], 2) == [[], []]


def test_every_problem_is_somebodys_and_equal_ones_are_dealt_out_evenly():
    shares = split_by_cost([1.0] * 10, 3)
    assert sorted(place for share in shares for place in share) == list(range(10))
    assert sorted(map(len, shares)) == [3, 3, 4]
