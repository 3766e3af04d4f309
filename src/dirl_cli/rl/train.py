"""Reinforcement learning, from top to bottom: sample groups of answers, reward them, and update the policy."""

from dirl_cli.rl.during_update import sampler_during_update
from dirl_cli.rl.groups import add_advantages
from dirl_cli.rl.reporting import RolloutReport
from dirl_cli.rl.rollout_metrics import rollout_metrics
from dirl_cli.rl.rollout_state import RolloutSource
from dirl_cli.rl.update import PolicyUpdate
from dirl_cli.rollout.sampler import Sampler
from dirl_cli.training.session import Evaluation, Session


def train(
    run: Session,
    rollouts: RolloutSource,
    update: PolicyUpdate,
    sampler: Sampler,
    report: RolloutReport,
    evaluation: Evaluation | None,
    learns: bool = True,
) -> None:
    """Take the steps that are left of a run. learns: False samples and writes rollouts, and updates nothing."""
    for step in run.remaining_steps(evaluation):
        # Rollout: G answers to each of P problems, rewarded. Groups without a signal make way for other problems.
        # Where the run is asked to stop, a rollout is given up; an update that has begun is finished.
        with run.timed("rollout"), run.showing("rollout"), run.stop.raising_if_alone():
            rollout = rollouts.collect(step)
        groups = add_advantages(rollout.groups, update.advantages)
        metrics = rollout_metrics(rollout, rollouts.answers_per_problem) | rollouts.epochs()
        report.write(step + 1, groups, rollout.sampled + (rollout.hinted or []))

        # Update: optimizer steps on the groups, each token in the state in which it was revealed. Meanwhile the
        # sampler is offloaded, or prefetches answers for the next steps.
        if groups and learns:
            with sampler_during_update(rollouts, sampler, step, run.steps), run.showing("update"):
                metrics |= update.run(groups, step)
            update.publish(sampler)

        # Report, evaluate and save where it is due; stop where it was asked for.
        run.end_of_step(metrics)
