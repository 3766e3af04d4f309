"""What the metrics of a run come to."""

from dirl_cli.overview.curves import MetricCourse, course_of, format_metric, is_leading, names_of, phase_seconds

HISTORY = [
    {"step": 1, "time": 1.0, "seconds/rollout": 2.0, "entropy": 0.5, "loss": 3.0, "greedy_accuracy": 0.2},
    {"step": 2, "time": 2.0, "seconds/rollout": 3.0, "entropy": 0.4, "loss": 1.0},
    {"step": 3, "time": 3.0, "seconds/rows": 1.0, "entropy": 0.6, "loss": 2.0, "greedy_accuracy": 0.1, "odd": 1},
]


def test_the_best_is_the_highest_or_lowest_by_what_a_metric_is():
    assert course_of(HISTORY, "loss") == MetricCourse("loss", 3.0, 2.0, (1.0, 2))
    assert course_of(HISTORY, "greedy_accuracy") == MetricCourse("greedy_accuracy", 0.2, 0.1, (0.2, 1))
    assert course_of(HISTORY, "entropy") == MetricCourse("entropy", 0.5, 0.6, None)


def test_the_leading_metrics_come_first_and_seconds_last():
    assert names_of(HISTORY) == ["loss", "greedy_accuracy", "entropy", "odd", "seconds/rollout", "seconds/rows"]
    assert [is_leading(name, "rl") for name in ("loss", "reward", "odd")] == [False, True, False]
    assert is_leading("loss", "sft") and is_leading("denoising_accuracy/0.5", "sft")
    assert not is_leading("reward/accuracy", "rl")  # a part of the reward


def test_numbers_are_written_as_they_are_read():
    assert format_metric("kept", 0.875) == "87.5 %"
    assert format_metric("denoising_accuracy/0.5", 1.0) == "100.0 %"
    assert format_metric("tokens_per_s", 123456.7) == "123,457"
    assert format_metric("loss", 3.7918e-09) == "3.792e-09"
    assert format_metric("loss", None) == ""


def test_seconds_are_summed_by_phase():
    assert phase_seconds(HISTORY) == {"rollout": 5.0, "rows": 1.0}
