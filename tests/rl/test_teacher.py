"""A teacher that reads another prompt than the policy, against one forward a state."""

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from dirl_cli.errors import DirlError
from dirl_cli.models.load import DiffusionLM
from dirl_cli.rl.batch import TrajectoryGroup
from dirl_cli.rl.corrections import Correction
from dirl_cli.rl.objective import Objective
from dirl_cli.rl.teacher import TeacherPrompt, of_the_same_tokens, token_keys
from dirl_cli.rl.update import PolicyUpdate
from dirl_cli.rollout.storage import Record
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.training.parallel import start_accelerator
from dirl_cli.training.trainer import Trainer, own
from dirl_cli.types import Instruction, Problem, Trajectory
from tests.helpers.algorithms import ALGORITHMS, algorithm
from tests.helpers.answers import ANSWERS, BLOCK, LONGEST, TOKENS, assert_same, gradient
from tests.helpers.small import PAD, Numbers, small_lm
from tests.helpers.steps import OPTIMIZERS
from tests.reference.objectives import as_sampled, state_logprobs

# Longer by 3, 1, 4 and 5 tokens than the questions, so that most prompts begin inside a block.
REFERENCES = ["20 21 22", "23", "24 25 26 27", "28 29 30 31 32"]


def prompt(template: str, positions: int = 64) -> TeacherPrompt:
    return TeacherPrompt(template, Numbers(), Instruction(), BLOCK, positions)


def groups() -> list[list[Record]]:
    """The answers written by hand, each with its problem."""
    found = []
    for answers, reference in zip(ANSWERS, REFERENCES, strict=True):
        question = " ".join(map(str, answers[0].prompt_ids))
        problem = Problem(reference, question, reference)
        found.append([Record(problem, k, "", one, 1.0, advantage=0.0) for k, one in enumerate(answers)])
    return found


def update(objective: Objective, teacher_prompt: TeacherPrompt | None, row_tokens: int = 64) -> PolicyUpdate:
    """Of a policy near a model of other weights that reads a prompt of its own."""
    lm, teacher = small_lm(scale=3.0), small_lm(scale=3.0, seed=1)
    model = LogprobModel(lm.model, lm.unsampled_ids)
    optimizers = OPTIMIZERS["adamw"].build(lm.model)
    return PolicyUpdate(
        Trainer(start_accelerator("cpu", "float32"), model, optimizers, lambda step: 1.0, clip_norm=1.0),
        objective,
        objective.estimator({}),
        lm,
        reference=LogprobModel(teacher.model, teacher.unsampled_ids),
        old_from_sampler=objective.is_exact,
        correction=Correction(cap=0.0),
        mini_batches=1,
        epochs=1,
        train_tail=True,
        row_tokens=row_tokens,
        micro_rows=1,
        longest=LONGEST,
        seed=0,
        teacher_prompt=teacher_prompt,
    )


def behind(one: Trajectory, reference: str) -> tuple[Trajectory, int]:
    """An answer behind question and reference, which begin so many tokens inside a block."""
    prompt_ids = [*one.prompt_ids, *map(int, reference.split())]
    filler = -len(reference.split()) % BLOCK
    return replace(one, prompt_ids=[PAD] * filler + prompt_ids), filler


def told_logprobs(lm: DiffusionLM, state: list[int], first: int) -> Tensor:
    """(L, V) as `state_logprobs`, of a sequence that begins at position `first`, as many tokens of `state` left out."""
    position = torch.arange(first, len(state))
    seen = position[:, None] // BLOCK >= position[None, :] // BLOCK
    token_ids = torch.tensor([state[first:]])
    logits = lm.model(input_ids=token_ids, attention_mask=seen[None, None], position_ids=position[None]).logits[0]
    return logits.float().index_fill(-1, torch.tensor(lm.unsampled_ids), -torch.inf).log_softmax(-1)


def teachers_logprobs(lm: DiffusionLM) -> dict[tuple[int, int], float]:
    """The log-prob of each token of each answer, told the reference, in the state that revealed it."""
    found, sample = {}, 0
    for answers, reference in zip(ANSWERS, REFERENCES, strict=True):
        for one in answers:
            moved, filler = behind(one, reference)
            for state, scored, _ in as_sampled(moved, TOKENS, Generator()):
                logprobs = told_logprobs(lm, state, filler)
                for k in scored:
                    found[sample, k] = logprobs[len(moved.prompt_ids) - filler + k, one.token_ids[k]].item()
            sample += 1
    return found


@pytest.mark.parametrize("name", ["opsd", "coupled_masks"])
def test_a_teacher_that_reads_the_plain_question_is_the_reference(name):
    objective = algorithm(name, beta=1.0, teacher="self", teacher_prompt="{question}")
    plain = update(objective, None).make_minibatch(groups(), 0, 0).micro_batches
    told = update(objective, prompt("{question}")).make_minibatch(groups(), 0, 0).micro_batches
    for rows, others in zip(plain, told, strict=True):
        assert torch.equal(rows.extras["ref_logprobs"], others.extras["ref_logprobs"])


@pytest.mark.parametrize("row_tokens", [1, 64, 400])
def test_a_teacher_scores_the_same_tokens_in_the_same_states_behind_its_own_prompt(row_tokens):
    policy = update(algorithm("opsd"), prompt("{question} {answer}"), row_tokens)
    slow = teachers_logprobs(small_lm(scale=3.0, seed=1))
    prompt_lengths = [len(one.prompt_ids) for some in ANSWERS for one in some]
    compared = 0
    for rows in policy.make_minibatch(groups(), 0, 0).micro_batches:
        places = zip(rows.extras["sample"].tolist(), rows.at_targets(rows.position).tolist(), strict=True)
        expected = [slow[sample, position - prompt_lengths[sample]] for sample, position in places]
        assert rows.extras["ref_logprobs"].tolist() == pytest.approx(expected, abs=1e-5)
        compared += len(expected)
    assert compared == len(slow)


def test_the_gradient_is_that_of_the_divergence_from_the_teacher():
    policy = update(algorithm("opsd"), prompt("{question} {answer}"))
    lm, batch = policy.lm, policy.make_minibatch(groups(), 0, 0)
    lm.model.zero_grad()
    ours = torch.zeros(())
    for rows in batch.micro_batches:
        logprobs, entropy, _ = policy.trainer.model(rows)
        loss = policy.objective.loss(rows, logprobs, entropy)["loss"] / batch.denominator
        loss.backward()
        ours += loss.detach()
    grad = gradient(lm)

    teacher = teachers_logprobs(small_lm(scale=3.0, seed=1))
    slow = torch.zeros(())
    for sample, one in enumerate(one for some in ANSWERS for one in some):
        for state, scored, _ in as_sampled(one, TOKENS, Generator()):
            logprobs = state_logprobs(lm, state)
            for k in scored:
                slow = slow + (teacher[sample, k] - logprobs[len(one.prompt_ids) + k, one.token_ids[k]]) ** 2 / 2
    slow = slow / len(teacher)
    lm.model.zero_grad()
    slow.backward()
    assert_same((ours.item(), grad), (slow.item(), gradient(lm)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_whatever_an_algorithm_draws_the_teacher_is_asked_the_same(name):
    objective = algorithm(name)
    policy = update(objective, prompt("{question} {answer}"), row_tokens=40)
    annotated = [TrajectoryGroup([record.trajectory for record in group], [0.0] * len(group)) for group in groups()]
    moved = policy.teacher_prompt.put(annotated, [group[0].problem for group in groups()])
    ours = list(own(policy.own_micro_batches(policy.pack_groups(annotated, 0, 0))))
    theirs = list(own(policy.own_micro_batches(policy.pack_groups(moved, 0, 0))))
    keys = torch.cat([token_keys(rows) for rows in theirs])
    assert len(keys.unique()) == len(keys)
    for each in ("targets", "weight"):
        scored = torch.cat([getattr(rows, each) for rows in theirs])
        for rows in ours:
            assert torch.equal(of_the_same_tokens(keys, scored, rows), getattr(rows, each))
    with pytest.raises(KeyError, match="other tokens than the policy"):
        of_the_same_tokens(keys[:-1], keys[:-1], theirs[-1])


def test_braces_of_a_problem_mean_nothing():
    problem = Problem("1", r"What is {answer} in \frac{1}{2}?", "{question}")
    told = prompt("Q: {question} A: {answer} {other}").filled_in(problem)
    assert told == r"Q: What is {answer} in \frac{1}{2}? A: {question} {other}"


def test_a_teacher_without_room_for_prompt_and_answer_is_told_in_a_sentence():
    update(algorithm("opsd"), prompt("{question} {answer}", positions=20)).make_minibatch(groups(), 0, 0)
    short = update(algorithm("opsd"), prompt("{question} {answer}", positions=19))
    with pytest.raises(DirlError, match="problem 20 21 22 and its answer take 20 positions, and the teacher has 19"):
        short.make_minibatch(groups(), 0, 0)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"teacher": "self"}, "algo.teacher=self reads algo.teacher_prompt"),
        ({"teacher_prompt": "{question}"}, "give algo.teacher, such as self"),
        ({"teacher": "self", "teacher_prompt": "{answer}"}, "name {question} in it"),
        ({"teacher": "self", "teacher_prompt": "{question}", "beta": 0.0}, "give algo.beta=1"),
    ],
)
def test_a_teacher_and_its_prompt_come_together(changed, sentence):
    with pytest.raises(DirlError, match=sentence):
        algorithm("dipo", **{"beta": 0.1, **changed})
