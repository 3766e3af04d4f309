"""Weighted sums of rewards, and what becomes of those that fail."""

import os
import time
from pathlib import Path
from random import Random

import pytest
from omegaconf import OmegaConf
from pytest import approx

from dirl_cli.cli.build import build
from dirl_cli.errors import DirlError
from dirl_cli.reward.pool import RewardPool
from dirl_cli.reward.rewards import Answer
from dirl_cli.reward.scoring import RewardComputer, RewardResult, RewardSettings
from dirl_cli.types import Problem
from tests.helpers.paths import ROOT

CONF = ROOT / "conf" / "reward"

OWN = """
import os
import time

def words(answer, *, times=1.0):
    return times * len(answer.completion.split())

def verdict(answer):
    return answer.verified + 100 * answer.correct

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__("odd")

def odd(answer):
    raise Odd(1, 2)

def hangs_on_b(answer):
    if answer.problem.id == "b":
        time.sleep(60)
    return 1.0

def dies(answer):
    os._exit(3)

def leaves(answer):
    raise SystemExit(4)

def nothing(answer):
    pass

def infinite(answer):
    return float("inf")

constant = 1.0
"""


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(OWN)
    return str(path)


def answer(problem: str, gold: str, completion: str, truncated: bool = False) -> Answer:
    return Answer(Problem(problem, "?", gold), completion, 10, truncated, 2.5, 100, 4)


ANSWERS = {
    ("a", 0): answer("a", "12", r"it is \boxed{12}"),
    ("a", 1): answer("a", "12", r"\boxed{13}"),
    ("b", 0): answer("b", r"\frac{1}{2}", r"\boxed{0.5}"),
    ("b", 1): answer("b", r"\frac{1}{2}", r"\boxed{0.5}", truncated=True),
}


def scores(rewards: RewardSettings, answers=ANSWERS) -> dict[tuple[str, int], RewardResult | None]:
    with RewardComputer(rewards) as reward_computer:
        found = list(reward_computer.compute(answers.items()))
    assert len(found) == len(answers)
    return dict(found)


def test_the_total_is_the_weighted_sum_and_the_parts_are_not_weighted():
    found = scores(RewardSettings({"accuracy": 1.0, "speed": 0.2, "boxed": 0.0}))
    assert found == {
        ("a", 0): RewardResult(approx(1.15), {"accuracy": 1.0, "speed": approx(0.75), "boxed": 0.1}, True),
        ("a", 1): RewardResult(approx(-0.05), {"accuracy": 0.0, "speed": approx(-0.25), "boxed": 0.1}, False),
        ("b", 0): RewardResult(approx(1.15), {"accuracy": 1.0, "speed": approx(0.75), "boxed": 0.1}, True),
        ("b", 1): RewardResult(approx(-0.05), {"accuracy": 0.0, "speed": approx(-0.25), "boxed": 0.1}, False),
    }


def test_options_reach_their_reward(own):
    rewards = RewardSettings(
        {"soft_overlong": 1.0, f"{own}:words": 1.0},
        options={"soft_overlong": {"cache": 95}, f"{own}:words": {"times": 2.0}},
    )
    one = scores(rewards, {("a", 0): ANSWERS["a", 0]})["a", 0]
    assert one.parts == {"soft_overlong": approx(-5 / 95), f"{own}:words": 6.0}


def test_a_users_rewards_see_the_verdict_by_file_and_by_import_path(own, monkeypatch):
    monkeypatch.syspath_prepend(Path(own).parent)
    found = scores(RewardSettings({f"{own}:verdict": 1.0, "rewards.words": 10.0}))
    assert {key: one.total for key, one in found.items()} == {("a", 0): 131, ("a", 1): 10, ("b", 0): 111, ("b", 1): 11}
    assert [one.correct for one in found.values()].count(True) == 2


def test_scores_do_not_depend_on_the_order_of_arrival(own):
    rewards = RewardSettings({"cosine": 0.1, f"{own}:words": 0.2, "repetition": 0.3, f"{own}:verdict": 0.7})
    shuffled = list(ANSWERS.items())
    Random(1).shuffle(shuffled)
    first, second = scores(rewards), scores(rewards, dict(shuffled))
    assert first == second
    assert [list(one.parts) for one in first.values()] == [list(rewards.weights)] * 4


def test_answers_are_scored_while_others_are_sampled():
    seen = []

    def sampled():
        for key, one in ANSWERS.items():
            yield key, one
            seen.append(key)

    with RewardComputer(RewardSettings({"accuracy": 1.0})) as reward_computer:
        next(iter(reward_computer.compute(sampled())))
    assert len(seen) < len(ANSWERS)


def test_a_reward_computer_serves_one_step_after_another():
    with RewardComputer(RewardSettings({"accuracy": 1.0})) as reward_computer:
        assert [dict(reward_computer.compute(ANSWERS.items())) for _ in range(2)] == [
            scores(RewardSettings({"accuracy": 1.0}))
        ] * 2


@pytest.mark.parametrize(
    "function, reason",
    [
        ("odd", r"Odd: odd \(.*rewards.py line 16\)"),
        ("dies", "(its process ended with code 3|All workers expired)"),
        ("leaves", "SystemExit: 4"),
        ("nothing", "TypeError: float"),
        ("infinite", "it gave inf"),
    ],
)
def test_a_reward_that_fails_stops_the_run_with_the_problem(own, function, reason):
    with pytest.raises(DirlError, match=rf"rewards.py:{function} failed on problem a: .*{reason}.*on_error=exclude"):
        scores(RewardSettings({"accuracy": 1.0, f"{own}:{function}": 1.0}), {("a", 0): ANSWERS["a", 0]})


def test_a_builtin_reward_given_nonsense_is_refused():
    with pytest.raises(DirlError, match=r"reward.options.soft_overlong.cache=0: give a whole number of at least 1"):
        RewardSettings({"soft_overlong": 1.0}, {"soft_overlong": {"cache": 0}})


def test_a_reward_that_hangs_costs_its_timeout(own):
    start = time.monotonic()
    with pytest.raises(DirlError, match=r"hangs_on_b failed on problem b: it took longer than 0.5 s"):
        scores(RewardSettings({f"{own}:hangs_on_b": 1.0}, timeout=0.5), {("b", 0): ANSWERS["b", 0]})
    assert time.monotonic() - start < 20


def test_failing_answers_are_counted_and_left_out_where_the_user_says_so(own):
    rewards = RewardSettings({"accuracy": 1.0, f"{own}:hangs_on_b": 1.0}, on_error="exclude", timeout=1.0)
    with RewardComputer(rewards) as reward_computer:
        found = dict(reward_computer.compute(ANSWERS.items()))
        assert reward_computer.excluded == {f"{own}:hangs_on_b": 2}
    assert {key: one and one.total for key, one in found.items()} == {
        ("a", 0): 2,
        ("a", 1): 1,
        ("b", 0): None,
        ("b", 1): None,
    }


def test_importing_a_reward_is_not_on_the_clock(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(1)\ndef reward(answer):\n    return 1")
    found = scores(RewardSettings({f"{slow}:reward": 1.0}, timeout=0.5), {("a", 0): ANSWERS["a", 0]})
    assert found["a", 0].total == 1


def test_a_reward_that_cannot_be_imported_again_fails_by_name(tmp_path):
    fussy = tmp_path / "fussy.py"
    fussy.write_text(f"import os\nassert os.getpid() == {os.getpid()}\ndef reward(answer):\n    return 1")
    with pytest.raises(DirlError, match=r"fussy.py:reward failed on problem a: .*AssertionError.*fussy.py line 2"):
        scores(RewardSettings({f"{fussy}:reward": 1.0}), {("a", 0): ANSWERS["a", 0]})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weights": {"acuracy": 1.0}}, "no reward is called acuracy: did you mean accuracy.*repetition.*length"),
        ({"weights": {"zzz": 1.0}}, "no reward is called zzz: choose one of accuracy, .*length.*rewards.py:my_reward"),
        (
            {"weights": {"nowhere.to.be": 1.0}},
            r"nowhere.to.be cannot be loaded \(No module named 'nowhere'\): check its path",
        ),
        ({"weights": {"nowhere.py:f": 1.0}}, "nowhere.py:f cannot be loaded .*nowhere.py.*: check its path"),
        ({"weights": {}}, "weights is empty"),
        ({"weights": {"accuracy": float("nan")}}, "weights.accuracy=nan: give a finite number"),
        ({"weights": {"accuracy": 1.0}, "options": {"speed": {}}}, "options.speed has no weight"),
        ({"weights": {"accuracy": 1.0}, "options": {"accuracy": {"x": 1}}}, "options.accuracy .*argument 'x'"),
        ({"weights": {"soft_overlong": 1.0}}, "options.soft_overlong .*argument: 'cache'"),
        ({"weights": {"accuracy": 1.0}, "on_error": "ignore"}, "on_error=ignore: choose one of stop, exclude"),
        ({"weights": {"accuracy": 1.0}, "workers": 0}, "workers=0: give a whole number of at least 1"),
        ({"weights": {"my_module": {"my_reward": 1.0}}}, "give a dotted name in braces, as {my_module"),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(DirlError, match=message):
        build(OmegaConf.create({"_target_": "dirl_cli.reward.scoring.RewardSettings", **settings}))


def test_a_file_without_the_function_names_those_it_has(own):
    for name in ("word", "constant"):
        with pytest.raises(DirlError, match=f"has no function {name}: .*words"):
            RewardSettings({f"{own}:{name}": 1.0})


def test_a_file_that_is_not_python_is_one_sentence(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "raising.py").write_text("f = nothing_of_that_name")
    for name in ("broken.py", "missing.py", "rewards.txt", "raising.py"):
        with pytest.raises(DirlError, match=f"{name}:f cannot be loaded"):
            RewardSettings({f"{tmp_path / name}:f": 1.0})


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_ready_reward_composes_and_scores(name):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        rewards = build(compose(name))
    assert isinstance(rewards, RewardSettings)
    found = scores(rewards)
    assert found["a", 0].total > found["a", 1].total


def test_processes_that_break_are_told_and_not_waited_for(monkeypatch):
    pool = RewardPool([], workers=1, timeout=5)

    def broken(*args, **kwargs):
        raise RuntimeError("Unexpected error within the Pool")

    monkeypatch.setattr(pool._pool, "schedule", broken)
    pool.submit("first", "my.reward", None, {})
    assert list(pool.rest()) == [("first", "the processes of rewards broke: Unexpected error within the Pool")]
    pool.close()
