"""Blocks that grow once what is held out has stopped improving."""

from random import Random

import pytest

from dirl_cli.training.block_stages import BlockStages, StagedEvaluation


def stages(**options) -> BlockStages:
    return BlockStages((2, 4), 8, **{"metric": "accuracy", "patience": 2} | options)


def sizes(run: BlockStages, values, every: int = 1, steps: int | None = None) -> list[int]:
    """The block size of each step of a run whose evaluations, after every so many steps, give these values."""
    found = []
    for step in range(steps or len(values) * every):
        found.append(run.size(step))
        if (step + 1) % every == 0 and step // every < len(values):
            run.observe(step + 1, {run.metric: values[step // every]})
    return found


def written_out(values, every, steps, patience, least, most, final=8, ladder=(2, 4)):
    """The rule in words: evaluate, compare with the best of the stage, give up after so many in vain."""
    found, stage, began, seen = [], 0, 0, []
    for step in range(steps):
        if stage < len(ladder) and most is not None and step - began == most:
            stage, began, seen = stage + 1, step, []
        found.append(ladder[stage] if stage < len(ladder) else final)
        if (step + 1) % every or step // every >= len(values) or stage == len(ladder):
            continue
        if most is not None and step + 1 - began == most:
            continue  # the stage ends here in any case
        seen.append(values[step // every])
        best = seen.index(max(seen))
        in_vain = len(seen) - 1 - best
        if in_vain >= patience and step + 1 - began >= least:
            stage, began, seen = stage + 1, step + 1, []
    return found


def test_a_stage_ends_after_so_many_evaluations_in_vain():
    assert sizes(stages(), [0.1, 0.3, 0.2, 0.3, 0.5, 0.5, 0.5, 0.9]) == [2, 2, 2, 2, 4, 4, 4, 8]


def test_of_a_loss_less_is_better():
    run = stages(metric="stage_loss", patience=1)
    assert sizes(run, [3.0, 2.0, 2.5, 9.0, 9.5]) == [2, 2, 2, 4, 4] and run.size(5) == 8


def test_each_stage_has_a_best_of_its_own():
    """What the second stage gives is below the first's best, and rises."""
    assert sizes(stages(patience=1), [0.9, 0.9, 0.1, 0.2, 0.3, 0.3, 0.0]) == [2, 2, 4, 4, 4, 4, 8]


def test_a_stage_lasts_its_least_and_ends_at_its_most_steps():
    assert sizes(stages(patience=1, least=4), [0.5] * 8) == [2, 2, 2, 2, 4, 4, 4, 4]
    rising = [i / 10 for i in range(10)]
    assert sizes(stages(most=3), rising) == [2, 2, 2, 4, 4, 4, 8, 8, 8, 8]
    assert sizes(stages(most=3), [], steps=7) == [2, 2, 2, 4, 4, 4, 8], "also where nothing is measured"


@pytest.mark.parametrize("seed", range(30))
def test_stages_are_those_of_the_rule_in_words(seed):
    rng = Random(seed)
    every, patience, least = rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 6)
    most = rng.choice([None, least + rng.randint(1, 8)])
    values = [rng.randint(0, 5) for _ in range(20)]
    run = stages(patience=patience, least=least, most=most)
    assert sizes(run, values, every) == written_out(values, every, 20 * every, patience, least, most)


@pytest.mark.parametrize("stopped_after", range(1, 12))
def test_a_run_goes_on_in_its_stage_from_any_step(stopped_after):
    values = [0.1, 0.3, 0.2, 0.3, 0.5, 0.6, 0.5, 0.5, 0.9, 0.8, 0.1, 0.0]
    through = stages(most=5)
    expected = sizes(through, values)

    first = stages(most=5)
    begun = sizes(first, values[:stopped_after])
    other = stages(most=5)
    other.restore(first.to_json())
    for step in range(stopped_after, len(values)):
        begun.append(other.size(step))
        other.observe(step + 1, {"accuracy": values[step]})
    assert begun == expected and other.to_json() == through.to_json()


def test_the_size_of_what_was_trained_stays_after_its_stage_has_ended():
    run = stages(patience=1)
    for step, value in enumerate([0.5, 0.5], start=1):
        run.size(step - 1)
        run.observe(step, {"accuracy": value})
    assert (run.trained_size(0), run.trained_size(2), run.size(2), run.size(0)) == (2, 2, 4, 2)


def test_an_evaluation_tells_the_stages_what_it_measured():
    class Measured:
        def before_training(self):
            return {"accuracy": 0.9}

        def measure(self):
            return {"accuracy": 0.5, "length": 3.0}

    run = stages(patience=1)
    evaluation = StagedEvaluation(Measured(), run, lambda: 1)
    assert evaluation.before_training() == {"accuracy": 0.9} and run.best is None
    assert evaluation.measure() == {"accuracy": 0.5, "length": 3.0} and run.best == 0.5
    assert str(run) == "blocks of 2, of 4, each until accuracy has not improved for 1 evaluations"
