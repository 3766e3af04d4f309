"""What holds for any input: hypothesis looks for the one for which it does not, the same ones every time."""

import gzip
import json
import string
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from omegaconf import OmegaConf

from dirl_cli.cli.build import build
from dirl_cli.cli.overrides import rewrite
from dirl_cli.cli.schema import slug
from dirl_cli.data.columns import rename_columns
from dirl_cli.data.demonstration_rows import demonstration
from dirl_cli.data.problem_rows import problem
from dirl_cli.data.rows import Row, read_rows
from dirl_cli.diffusion.layout import PADDING, lay_out, pack
from dirl_cli.errors import DirlError
from dirl_cli.evaluation.answers import GradedAnswer, checked, read_answers
from dirl_cli.reward.boxed import last_boxed
from dirl_cli.reward.equality import plainly_equal
from dirl_cli.reward.grading import Grader
from dirl_cli.rollout.storage import Record, from_json, read_rollout, to_json, write_rollout
from dirl_cli.text import escape_controls, redact
from dirl_cli.types import Decoding, Problem, Trajectory
from tests.helpers.asked import asked

settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same")

anything = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = some.sampled_from(
    ["prompt", "response", "question", "ground_truth_answer", "messages", "id", "role", "content"]
)
objects = some.dictionaries(names | some.text(max_size=8), anything | some.text(max_size=20), max_size=6)
maths = some.text(alphabet=r"0123456789.,/+-*^_=()[]{}\ frcsqtboxedpim%$:", max_size=40)
words = some.text(alphabet=string.ascii_letters + string.digits + "=,.[]{}'\"$/\\:()+~ é", max_size=30)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def grader():
    with Grader(1, 1.0) as one:
        yield one


def refused(read: Any) -> bool:
    """Whether a function refuses with the one error that is told; any other is a failure of the test."""
    try:
        read()
    except DirlError as error:
        assert str(error) == escape_controls(str(error))
        return True
    return False


# Layout

samples = some.lists(
    some.tuples(some.integers(1, 8), some.integers(0, 30), some.integers(0, 2**30)), min_size=1, max_size=6
)


@given(samples, some.sampled_from([1, 2, 4, 8]), some.integers(1, 64))
def test_packing_loses_no_token_and_mixes_no_two_samples(drawn, block_size, row_tokens):
    strips = []
    for i, (blocks, prompt, seed) in enumerate(drawn):
        length = blocks * block_size
        generator = torch.Generator().manual_seed(seed)
        masked_tokens = (torch.arange(length) >= prompt) & (torch.rand(1, length, generator=generator) < 0.5)
        token_ids = torch.arange(length) + 100 * (i + 1)
        weight = torch.rand(1, length, generator=generator)
        strips.append(lay_out(token_ids, masked_tokens, masked_tokens, weight, block_size, 7))
    rows = pack(strips, row_tokens, block_size, 0)
    flat = {name: getattr(rows, name).flatten() for name in ("token_ids", "strip", "position", "view")}
    for i, strip in enumerate(strips):
        own = flat["strip"] == i
        for name in ("token_ids", "position", "view"):
            assert flat[name][own].tolist() == getattr(strip, name).tolist()
        scores = flat["strip"][rows.target_index] == i
        assert rows.targets[scores].tolist() == strip.targets.tolist()
        assert rows.weight[scores].tolist() == strip.weight.tolist()
    assert (flat["strip"] == PADDING).sum() == flat["strip"].numel() - sum(map(len, strips))
    assert rows.token_ids.shape[1] <= max(row_tokens, *map(len, strips))


# Files

token_ids = some.integers(0, 2**31 - 1)
numbers = some.floats(-1e14, 1e14)
trajectories = some.builds(
    lambda steps, commits, **more: Trajectory(
        token_ids=[token for token, _, _ in steps],
        reveal_step=[step for _, step, _ in steps],
        logprobs=[logprob for _, _, logprob in steps],
        forwards=more["denoise_forwards"] + commits,
        **more,
    ),
    some.lists(some.tuples(token_ids, some.integers(1, 64), some.floats(-1e14, 0)), min_size=1, max_size=8),
    some.integers(0, 9),
    prompt_ids=some.lists(token_ids, max_size=5),
    stop_reason=some.sampled_from(["stop", "length"]),
    denoise_forwards=some.integers(1, 99),
    weights_version=some.integers(0, 9),
    stop_token_ids=some.lists(some.integers(0, 9), max_size=2).map(tuple),
)
records = some.builds(
    Record,
    problem=some.builds(Problem, some.text(), some.text(), some.text(), some.text()),
    sample=some.integers(0, 9),
    completion=some.text(),
    trajectory=trajectories,
    reward=some.none() | numbers,
    parts=some.dictionaries(some.text(), numbers, max_size=3),
    correct=some.booleans(),
    advantage=some.none() | numbers,
    learned_from=some.booleans(),
)


@given(some.lists(records, max_size=3))
def test_a_rollout_comes_back_as_it_was_written(place, found):
    path = place / "step-000001.jsonl"
    write_rollout(path, found)
    assert read_rollout(path) == found


@given(
    records, some.sampled_from(sorted({field.name for field in fields(Trajectory)} | {"problem", "parts"})), anything
)
def test_a_rollout_with_any_value_is_read_or_refused(place, record, key, value):
    path = place / "step-000001.jsonl"
    path.write_text(json.dumps(to_json(record) | {key: value}))
    if not refused(lambda: read_rollout(path)):
        assert from_json(json.loads(path.read_text()))


@given(some.lists(objects | anything, max_size=4), some.sampled_from(["json", "jsonl", "jsonl.gz"]))
def test_any_json_is_read_or_refused_with_its_place(place, content, kind):
    path = place / f"a.{kind}"
    text = json.dumps(content) if kind == "json" else "\n".join(map(json.dumps, content))
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    rows: list[Row] = []
    if not refused(lambda: rows.extend(read_rows(path))):
        assert [row.fields for row in rows] == json.loads(json.dumps([row for row in content if isinstance(row, dict)]))
    for row in rename_columns(rows, {"question": "prompt", "content": "id"}):
        refused(lambda row=row: demonstration(row))
        refused(lambda row=row: problem(row, "0"))


@given(some.binary(max_size=200), some.sampled_from(["json", "jsonl", "jsonl.gz", "parquet"]))
def test_any_bytes_are_read_or_refused(place, content, kind):
    path = place / f"a.{kind}"
    path.write_bytes(content)
    refused(lambda: read_rows(path))


@given(some.sampled_from([field.name for field in fields(GradedAnswer)]), anything)
def test_any_line_of_answers_is_read_or_refused(place, key, value):
    good = asdict(GradedAnswer("a", 0, "text", True, "stop", 1, 4, 1, 1, 0.5))
    path = place / "answers.jsonl"
    path.write_text(json.dumps(good | {key: value}) + "\n")
    if not refused(lambda: read_answers(path)):
        assert checked(read_answers(path)[0])


# Configurations


@given(some.sampled_from([field.name for field in fields(Decoding)] + ["odd"]), anything)
def test_a_config_with_any_value_is_built_or_refused(key, value):
    refused(
        lambda: build(OmegaConf.create({"decoding": {key: value}}, flags={"allow_objects": True}).decoding, Decoding)
    )


@given(some.lists(words, max_size=3), some.booleans())
def test_spelling_out_overrides_is_done_in_one_go(given_words, sweep):
    known = {"model": ["tiny", "path"], "data": ["arithmetic", "file"], "algo": ["dipo", "grpo"]}
    spelled: list[str] = []
    if not refused(lambda: spelled.extend(rewrite(given_words, lambda group: known.get(group, []), sweep))):
        assert rewrite(spelled, lambda group: known.get(group, []), sweep) == spelled


@given(some.text(max_size=300) | words)
def test_a_slug_is_the_name_of_one_file(text):
    name = slug(text)
    assert bool(name) == bool(text) and name not in (".", "..")
    assert Path(name).name == name and not set("\\\0") & set(name)
    assert len(name.encode(errors="surrogatepass")) <= 200


# Text


@given(some.text())
def test_what_is_printed_moves_no_cursor_and_says_the_same(text):
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in escape_controls(text))
    assert len(escape_controls(text)) == len(text) and escape_controls(escape_controls(text)) == escape_controls(text)


@given(some.text(), some.text(alphabet=string.ascii_letters + string.digits, min_size=20))
def test_a_token_is_left_out_wherever_it_stands(text, token):
    assert f"hf_{token}" not in redact(f"{text} hf_{token} {text}")


# Grading


@given(maths, maths)
def test_plain_grading_never_raises_and_what_is_equal_is_so_both_ways(gold, answer):
    verdict = plainly_equal(gold, answer)
    assert verdict in (True, False, None)
    if gold.strip():
        assert plainly_equal(gold, gold) is True


@given(some.integers(-(10**9), 10**9), some.integers(1, 10**4), some.integers(-(10**9), 10**9))
def test_numbers_are_equal_in_either_order(top, bottom, other):
    texts = [rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", str(other)]
    for a in texts:
        for b in texts:
            assert plainly_equal(a, b) == plainly_equal(b, a)
    assert plainly_equal(texts[0], texts[1])


@settings(max_examples=25)
@given(some.lists(some.tuples(maths, maths), max_size=3))
def test_grading_reaches_a_verdict_on_anything(grader, pairs):
    items = [(i, asked(gold), rf"so \boxed{{{answer}}}") for i, (gold, answer) in enumerate(pairs)]
    verdicts = dict(grader.grade(items))
    assert verdicts.keys() == set(range(len(pairs))) and set(verdicts.values()) <= {0.0, 1.0}


@given(some.text(alphabet=r"\boxed{} 5", max_size=60))
def test_what_stands_in_the_last_box_is_part_of_the_text(text):
    found = last_boxed(text)
    assert found is None or (found in text and found == found.strip())
