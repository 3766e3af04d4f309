"""What steps are worth: advantages and values against slow versions, and runs that learn them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hydra.errors import HydraException

from dirl_cli.diffusion.layout import Rows
from dirl_cli.errors import DirlError
from dirl_cli.models.peft import FullFinetune
from dirl_cli.rl.batch import TrajectoryGroup, steps_of_blocks
from dirl_cli.rl.critic import Critic, LearnedCritic, StepAdvantages, ValueModel, value_metrics
from dirl_cli.rl.objective import Objective
from dirl_cli.rollout.storage import read_rollout
from tests.helpers.algorithms import algorithm
from tests.helpers.answers import ANSWERS, BLOCK, TOKENS, answer, assert_same
from tests.helpers.rl_runs import config, lines, run, save_sharp_model, updates, weights
from tests.helpers.small import PAD, small_lm
from tests.helpers.whole_batch import objective_rows
from tests.reference.steps_worth import value_loss, values_of_steps, worth_of_tokens

EVERY = [one for some in ANSWERS for one in some]
WORTH = [0.5, -1.0, 0.25, 1.0, -1.0, 0.75, -0.5, 1.5, -0.25]  # of each answer beside its group's others
SETTINGS = LearnedCritic(True, 1.0, 1.0, 0.2, 1e-3, (0.9, 0.95), 1e-8, 0.0)


def groups(process: bool = False) -> list[TrajectoryGroup]:
    worth = iter(WORTH)
    made = []
    for some in ANSWERS:
        rewards = [step_rewards(one) for one in some] if process else []
        made.append(TrajectoryGroup(some, [next(worth) for _ in some], rewards))
    return made


def step_rewards(one) -> list[float]:
    """Of each denoising step, all different."""
    return [0.1 * (i + 1) * (-1) ** i for i in range(sum(steps_of_blocks(one, BLOCK)))]


def random_critic(lm) -> ValueModel:
    model = SETTINGS.model(lm)
    with torch.no_grad():
        model.weight.copy_(0.3 * torch.randn(len(model.weight), generator=torch.Generator().manual_seed(3)))
    return model


def parts_of(objective: Objective, of: list[TrajectoryGroup], row_tokens: int = 60) -> list[Rows]:
    return objective_rows(of, objective, TOKENS, PAD, row_tokens, True, torch.Generator())[0].split(1)


def with_values(rows: Rows, values) -> Rows:
    return replace(rows, extras={**rows.extras, "values": values.detach()})


def by_token(parts: list[Rows]) -> dict[tuple[int, int], tuple[float, float]]:
    """Advantage and return by answer and token."""
    found = {}
    for rows in parts:
        for i, sample in enumerate(rows.extras["sample"].tolist()):
            index = int(rows.at_targets(rows.position)[i]) - len(EVERY[sample].prompt_ids)
            found[sample, index] = (rows.extras["advantage"][i].item(), rows.extras["returns"][i].item())
    return found


def assert_equal_worth(found, expected) -> None:
    assert found.keys() == expected.keys() and len(found) == sum(len(one.token_ids) for one in EVERY)
    for token, pair in expected.items():
        assert found[token] == pytest.approx(pair, abs=1e-5), token


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
@pytest.mark.parametrize(("name", "merged"), [("dipo", 1), ("tracerl", 2)])
@pytest.mark.parametrize("row_tokens", [1, 60, 1000])
def test_advantages_and_returns_are_those_written_out_step_by_step(name, merged, gamma, gae_lambda, row_tokens):
    lm = small_lm(scale=3.0)
    model = random_critic(lm)
    advantages = StepAdvantages(gamma, gae_lambda)
    found = by_token(
        [advantages(with_values(rows, model(rows)[0])) for rows in parts_of(algorithm(name), groups(), row_tokens)]
    )
    expected = {}
    for sample, one in enumerate(EVERY):
        steps = values_of_steps(model, lm, one, merged)
        rewards = [0.0] * (len(steps) - 1) + [WORTH[sample]]
        for index, pair in worth_of_tokens(steps, rewards, gamma, gae_lambda).items():
            expected[sample, index] = pair
    assert_equal_worth(found, expected)


def test_without_discount_an_advantage_is_the_return_less_the_value():
    for rows in parts_of(algorithm("dipo"), groups()):
        values = torch.randn(len(rows.targets), generator=torch.Generator().manual_seed(0))
        extras = StepAdvantages()(with_values(rows, values)).extras
        assert torch.allclose(extras["returns"], rows.extras["advantage"])
        assert torch.allclose(extras["advantage"], extras["returns"] - values, atol=1e-6)


def test_rewards_of_steps_count_for_the_steps_before_them_without_a_critic_too():
    advantages = StepAdvantages(gamma=0.5)
    found = by_token([advantages(rows) for rows in parts_of(algorithm("dipo"), groups(process=True))])
    lm = small_lm()
    model = SETTINGS.model(lm)  # whose values are 0
    expected = {}
    for sample, one in enumerate(EVERY):
        rewards = step_rewards(one)
        rewards[-1] += WORTH[sample]
        for index, pair in worth_of_tokens(values_of_steps(model, lm, one), rewards, 0.5, 1.0).items():
            expected[sample, index] = pair
            assert pair[0] == pytest.approx(pair[1])
    assert_equal_worth(found, expected)


def test_steps_that_are_merged_have_the_sum_of_their_rewards():
    one = answer([5, 6, 7, 8], 4, seed=0)
    one = replace(one, reveal_step=[1, 2, 3, 3])
    [rows] = parts_of(algorithm("tracerl"), [TrajectoryGroup([one], [2.0], [[1.0, 10.0, 100.0]])])
    assert StepAdvantages()(rows).extras["returns"].tolist() == [113.0, 113.0, 102.0, 102.0]


@pytest.mark.parametrize("row_tokens", [1, 60, 1000])
def test_the_loss_of_values_and_its_gradient_are_those_written_out_state_by_state(row_tokens):
    lm = small_lm(scale=3.0)
    model = random_critic(lm)
    shift = 0.4 * torch.randn(9, 10, generator=torch.Generator().manual_seed(5))
    critic = Critic(trainer=None, clip=0.2)
    parts = parts_of(algorithm("dipo"), groups(), row_tokens)
    tokens = sum(len(rows.targets) for rows in parts)
    total = 0.0
    for rows in parts:
        values = model(rows)[0]
        sample = rows.extras["sample"]
        index = rows.at_targets(rows.position) - torch.tensor([len(one.prompt_ids) for one in EVERY])[sample]
        old = with_values(rows, values + shift[sample, index])
        loss = critic.loss(StepAdvantages(0.9, 0.8)(old), values)["loss"] / tokens
        loss.backward()
        total += loss.item()
    ours = (total, taken_gradient(model))

    terms = []
    for sample, one in enumerate(EVERY):
        steps = values_of_steps(model, lm, one)
        rewards = [0.0] * (len(steps) - 1) + [WORTH[sample]]
        worth = worth_of_tokens(steps, rewards, 0.9, 0.8)
        for step in steps:
            for k, value in step.items():
                terms.append(value_loss(value, value.item() + shift[sample, k].item(), worth[k][1], 0.2))
    loss = torch.stack(terms).mean()
    loss.backward()
    assert any(not term.requires_grad for term in terms)  # the clip holds somewhere
    assert_same(ours, (loss.item(), taken_gradient(model)))


def taken_gradient(model: ValueModel) -> torch.Tensor:
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


def test_a_critic_begins_with_values_of_zero_and_a_head_leaves_the_policy_alone():
    lm = small_lm()
    [rows, *_] = parts_of(algorithm("dipo"), groups())
    for separate in (True, False):
        model = replace(SETTINGS, separate=separate).model(lm)
        [values] = model(rows)
        assert (values == 0).all()
        (values - 1).square().sum().backward()
        assert model.weight.grad.norm() > 0
        assert all(parameter.grad is None for parameter in lm.model.parameters())
        assert len(list(model.parameters())) == (len(list(lm.model.get_decoder().parameters())) + 1 if separate else 1)


def test_explained_variance_is_the_share_of_the_returns_that_values_foretell():
    returns, values = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([1.5, 2.0, 2.0, 5.0])
    rows = replace(parts_of(algorithm("dipo"), groups())[0], extras={"returns": returns, "values": values})
    sums = {name: value.item() / 4 for name, value in Critic(None, 0.2).loss(rows, values).items()}
    expected = 1 - (returns - values).var() / returns.var()
    step = {**sums, "grad_norm": 0.0, "lr": 0.0}
    assert value_metrics([step])["explained_variance"] == pytest.approx(expected.item(), abs=1e-6)
    flat = {**step, "return": 1.0, "return_square": 1.0}
    assert value_metrics([flat])["explained_variance"] == 0.0


# Runs


A_STEP = """
def a_step(answer):
    return [float(len(step)) for block in answer.blocks for step in block.steps]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sharp_model(tmp_path_factory.mktemp("random") / "model")


WORDS = ("eval_problems=0", "show_every=0", "rl.mini_batches=2", "rl.epochs=2", "row_tokens=64")


@pytest.mark.parametrize("critic", ["model", pytest.param("head", marks=pytest.mark.slow)])
def test_a_run_with_a_critic_goes_on_from_a_checkpoint_to_the_same_bytes(model, tmp_path, capsys, critic):
    words = (*WORDS, f"critic={critic}", "critic.lr=1e-2", "critic.gae_lambda=0.9", "steps=4", "save_every=1")
    run(config(model, *words), tmp_path / "through")
    shutil.copytree(tmp_path / "through", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/model")
    shutil.rmtree(tmp_path / "again/checkpoints/step-000004")
    run(config(model, *words), tmp_path / "again")
    assert "going on after step 3" in capsys.readouterr().out
    assert weights(tmp_path / "again") == weights(tmp_path / "through")
    assert updates(tmp_path / "again") == updates(tmp_path / "through")
    for name in ("critic", "critic_optimizer"):
        file = f"checkpoints/step-000004/{name}.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "through" / file).read_bytes()


def test_values_come_to_foretell_returns_while_the_policy_learns(model, tmp_path):
    words = ("critic=model", "critic.lr=1e-2", "steps=12", "save_every=12", "rl.problems=4", "rl.group_size=4")
    run(config(model, "eval_problems=0", "show_every=0", *words, "rl.epochs=2", "optim.lr=3e-3"), tmp_path)
    found = lines(tmp_path)
    assert found[0]["explained_variance"] == 0  # of values that are all 0
    assert fmean(line["explained_variance"] for line in found[-5:]) > 0.1
    assert fmean(line["reward"] for line in found[-4:]) > fmean(line["reward"] for line in found[:4]) + 0.1


def test_the_first_step_of_a_critic_that_knows_nothing_is_that_without_one(model, tmp_path):
    for critic in ("none", "model"):
        words = ("eval_problems=0", "steps=1", f"critic={critic}")
        run(config(model, *words), tmp_path / critic)
    without, with_critic = lines(tmp_path / "none")[0], lines(tmp_path / "model")[0]
    assert with_critic["loss"] == pytest.approx(without["loss"], abs=1e-6)
    assert with_critic["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-5)
    assert "value_loss" not in without and "seconds/critic" in with_critic


def test_process_rewards_of_a_function_are_on_record_and_those_of_a_file_are_learned_from(model, tmp_path):
    (tmp_path / "judge.py").write_text(A_STEP)
    process = f"+reward.process={{{tmp_path}/judge.py\\:a_step: 0.5}}"
    words = ("eval_problems=0", "show_every=0", "steps=2", "critic.gamma=0.9")
    run(config(model, *words, process), tmp_path / "judged")
    assert all(line["process_reward"] > 0 for line in lines(tmp_path / "judged"))
    run(config(model, *words, f"rl.replay={tmp_path}/judged"), tmp_path / "replayed")
    assert weights(tmp_path / "replayed") == weights(tmp_path / "judged")

    # Of blocks in place of steps, written by another program.
    shutil.copytree(tmp_path / "judged/rollouts", tmp_path / "other")
    for step in (1, 2):
        file = tmp_path / f"other/step-{step:06d}.jsonl"
        changed = []
        for record, line in zip(read_rollout(file), file.read_text().splitlines(), strict=True):
            assert len(record.process) == record.trajectory.denoise_forwards
            blocks = len(steps_of_blocks(record.trajectory, 4))
            changed.append(json.dumps({**json.loads(line), "process": [0.25] * blocks}))
        file.write_text("\n".join(changed) + "\n")
    run(config(model, *words, f"rl.replay={tmp_path}/other"), tmp_path / "others")
    assert weights(tmp_path / "others") != weights(tmp_path / "judged")

    file.write_text(json.dumps({**json.loads(line), "process": [0.25] * 99}) + "\n")
    with pytest.raises(DirlError, match=r"step-000002.jsonl line 1: process holds 99 values for"):
        run(config(model, *words, f"rl.replay={tmp_path}/other"), tmp_path / "refused")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["critic=model", "algo=egspo"], "a critic wants every step of the trace, which algo=egspo does not score"),
        (["critic=head", "algo=gdpo"], "a critic wants every step of the trace, which algo=gdpo does not score"),
        (["critic.gamma=0.9", "algo=unigrpo"], "critic.gamma=0.9 wants every step of the trace"),
        (["critic=model", "peft=lora"], "critic=model trains a second model whole.*: give critic=head"),
        (["critic=other"], "other"),
        (["+reward.process={accuracy: 1}"], "reward.process.accuracy is a reward of whole answers"),
        (["critic=model", "critic.gamma=1.1"], "critic.gamma=1.1: give a number above 0 and at most 1"),
    ],
)
def test_what_cannot_be_valued_is_refused_in_a_sentence(model, tmp_path, words, sentence):
    with pytest.raises((DirlError, HydraException), match=sentence):
        run(config(model, *words), tmp_path)


def test_a_head_is_refused_where_processes_share_the_policy():
    SETTINGS.require(FullFinetune(), "fsdp2")
    with pytest.raises(DirlError, match="shares out the policy, whose hidden states critic=head reads"):
        replace(SETTINGS, separate=False).require(FullFinetune(), "fsdp2")
