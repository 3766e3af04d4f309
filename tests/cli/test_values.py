"""What a setting may be: every number of the config tree, and the sentences for values that make no sense."""

import math
import shlex
import sys
from dataclasses import is_dataclass
from importlib import import_module
from io import BytesIO, StringIO, TextIOWrapper
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from typer.testing import CliRunner

from dirl_cli.cli import config_tree
from dirl_cli.cli.app import app
from dirl_cli.cli.build import build
from dirl_cli.cli.explain import explain
from dirl_cli.cli.launch import check_values
from dirl_cli.cli.schema import SCHEMAS
from dirl_cli.console import replace_unencodable
from dirl_cli.errors import DirlError
from dirl_cli.files import conf_dir
from dirl_cli.ranges import OneOf, Range, describe_type, limit_of, require, type_at, types_of, without_none

MANDATORY = {
    "data.sources": [{"path": "a.jsonl"}],
    "data.path": "a.jsonl",
    "bench.path": "a.jsonl",
    "model.path": "a",
    "to": "b",
}
SENSELESS = (math.nan, math.inf, -1, 0, "ten")


def targets():
    """The file of each class that the config tree names, the first of those that name it: (group, choice)."""
    found = {}
    for file in sorted(conf_dir().glob("*/*.yaml")):
        target = yaml.safe_load(file.read_text()).get("_target_")
        if target and target not in found:
            found[target] = (file.parent.name, file.stem)
    return found


def composed(command, *words):
    """The config of a command with what it wants at least."""
    model = ["model=path"] if command == "merge" else []
    config_tree.prepare(None)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(command, [*model, *words])
    for key, value in MANDATORY.items():
        if OmegaConf.is_missing(OmegaConf.select(cfg, key.rpartition(".")[0]) or cfg, key.rpartition(".")[2]):
            OmegaConf.update(cfg, key, value)
    OmegaConf.resolve(cfg)
    return cfg


def numbers(settings, kind, prefix=""):
    """(key, type) of each number in plain containers whose type is `kind`, those that are null now among them."""
    for key, value in config_tree.leaves(settings):
        hint = without_none(type_at(kind, key))
        if isinstance(value, list):
            first = type_at(kind, f"{key}[0]")
            if isinstance(limit_of(first), Range) or (value and isinstance(value[0], int | float)):
                yield f"{prefix}{key}[0]", first
        elif isinstance(limit_of(hint), Range) or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield f"{prefix}{key}", hint


def put(cfg, key, value):
    """Set a key, which may be the first of a list."""
    name, is_first, _ = key.partition("[")
    OmegaConf.update(cfg, name, [value, *OmegaConf.select(cfg, name)[1:]] if is_first else value)


def verdict(command, cfg, key, value, check):
    """The sentence for a value under a key, as the command line says it; nothing if it is allowed."""
    name = key.partition("[")[0]
    before = OmegaConf.to_container(OmegaConf.create({"it": OmegaConf.select(cfg, name)}))["it"]
    try:
        put(cfg, key, value)
        check()
    except ValidationError as error:  # Hydra raises it while it composes
        wrapped = ConfigCompositionException(f"Error merging override {key}={value}")
        wrapped.__cause__ = error
        return explain(wrapped, command, [])
    except DirlError as error:
        return str(error)
    finally:
        OmegaConf.update(cfg, name, before)
    return ""


def judge(command, cfg, keys, check):
    """Every senseless value of every key is refused by a sentence that names the key, or in the key's range."""
    assert keys
    for key, hint in keys:
        limit = limit_of(hint)
        assert isinstance(limit, Range), f"{key} is a number without a range: give its type one of dirl_cli/ranges.py"
        whole = get_args(hint)[0] is int
        for value in SENSELESS:
            sentence = verdict(command, cfg, key, value, check)
            allowed = value != "ten" and not (whole and value == math.inf) and limit.holds(value)
            assert bool(sentence) != allowed, f"{key}={value}: {sentence or 'was taken'}"
            assert not sentence or sentence.startswith(key.partition("[")[0]), sentence
            assert "\n" not in sentence and "Value '" not in sentence


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_number_of_a_command_is_in_its_range_or_refused_by_name(command):
    cfg = composed(command)
    keys = list(numbers(OmegaConf.to_container(cfg), SCHEMAS[command]))
    groups = [name for name, hint in types_of(SCHEMAS[command]).items() if hint is Any]
    keys = [(key, hint) for key, hint in keys if key.partition(".")[0] not in groups]
    if keys or command not in ("merge", "download"):
        judge(command, cfg, keys, lambda: require(OmegaConf.to_container(cfg), SCHEMAS[command]))
    check_values(command, cfg)


@pytest.mark.parametrize(("group", "choice"), targets().values(), ids=lambda value: value)
def test_every_number_of_a_group_is_in_its_range_or_refused_by_name(group, choice):
    command = next(name for name in ("sft", "rl", "dpo", "eval") if group in types_of(SCHEMAS[name]))
    cfg = composed(command, f"{group}={choice}")
    kind = type(build(cfg[group]))
    settings = OmegaConf.to_container(cfg[group])
    for key in ("published", "options"):  # figures that are shown beside ours; a reward's, which it types itself
        settings.pop(key, None)
    keys = list(numbers(settings, kind, f"{group}."))
    if views := settings.get("views"):
        keys = [(key, hint) for key, hint in keys if ".views." not in key]
        keys += numbers(views, type(build(cfg[group]).views), f"{group}.views.")
    if keys:
        judge(command, cfg, keys, lambda: build(cfg[group]))


def bare(hint):
    """Whether a type holds numbers whose range it does not say."""
    if get_origin(hint) is Annotated:
        return False
    return hint in (int, float) or any(bare(one) for one in get_args(hint))


def test_no_settings_have_a_number_without_a_range():
    kinds = set(SCHEMAS.values())
    for target in [*targets(), "dirl_cli.types.Decoding", "dirl_cli.types.Instruction", *views()]:
        module, _, name = target.rpartition(".")
        kinds.add(getattr(import_module(module), name))
    kinds |= {one for kind in set(kinds) for hint in types_of(kind).values() for one in nested(hint)}
    assert len(kinds) > 35
    missing = [f"{kind.__name__}.{key}" for kind in kinds for key, hint in types_of(kind).items() if bare(hint)]
    assert missing == []


def views():
    files = [yaml.safe_load(file.read_text()) for file in conf_dir().glob("algo/*.yaml")]
    return [file["views"]["_target_"] for file in files]


def nested(hint):
    """The dataclasses of our own that a type holds."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for one in get_args(hint):
        yield from nested(one)


def test_the_walk_finds_a_number_without_a_range():
    assert bare(int) and bare(list[float]) and bare(dict[str, float]) and bare(int | None)
    assert not bare(Annotated[int, Range(at_least=1)] | None) and not bare(bool) and not bare(Any)


# Sentences


def test_a_type_tells_what_a_setting_may_be():
    one = Annotated[float, Range(above=0, infinite=True, remark="inf switches it off")]
    assert describe_type(one) == "a number above 0; inf switches it off"
    assert describe_type(Annotated[int, Range(at_least=1)] | None) == "a whole number of at least 1, or null"
    assert describe_type(Annotated[float, Range()]) == "a finite number"
    assert describe_type(tuple[float, float] | None).startswith("a list of 2, each item")
    assert describe_type(Annotated[str, OneOf("a", "b")]) == "one of a, b"
    assert (describe_type(bool), describe_type(str)) == ("true or false", "text")


def test_a_range_holds_its_numbers():
    share = Range(at_least=0, below=1)
    assert [share.holds(x) for x in (-0.1, 0, 0.5, 1, math.nan, math.inf)] == [False, True, True, False, False, False]
    either = Range(at_least=0, whole_from_one=True)
    assert [either.holds(x) for x in (0.5, 1.0, 1.5, 2, math.inf)] == [True, True, False, True, False]
    assert Range(above=0, infinite=True).holds(math.inf) and not Range(above=0, infinite=True).holds(-math.inf)


def refused(*words):
    """The one sentence with which a command line is refused, before anything is written."""
    result = CliRunner().invoke(app, list(words), env={"HYDRA_FULL_ERROR": "0"})
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    return sentence.partition(": ")[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sft clip_norm=-1", "clip_norm=-1: give a number above 0; inf switches it off"),
        ("sft clip_norm=0", "clip_norm=0: give a number above 0; inf switches it off"),
        ("sft clip_norm=null", "clip_norm=null: give a number above 0; inf switches it off"),
        ("sft steps=-5", "steps=-5: give a whole number of at least 1"),
        ("sft steps=ten", "steps=ten: give a whole number of at least 1"),
        ("sft batch_size=0", "batch_size=0: give a whole number of at least 1"),
        ("sft optim.lr=nan", "optim.lr=nan: give a number above 0; at 0 nothing is learned"),
        ("sft optim.lr=0", "optim.lr=0: give a number above 0; at 0 nothing is learned"),
        ("sft optim.adamw_lr=0", "optim.adamw_lr=0: give a number above 0; at 0 embeddings, "),
        ("sft steps = 10", "=: an override has the form KEY=VALUE, without spaces"),
        ("sft steps =10", "=10: an override has the form KEY=VALUE, without spaces"),
        ("sft gpus=0", "gpus=0: give a whole number of at least 1"),
        ("sft optim=null", "optim=null names nothing: choose one of adamw, "),
        ("sft data=", "data= names nothing: choose one of arithmetic, "),
        ("sft device=gpu", "device=gpu: did you mean cuda?"),
        ("sft dtype=bf16", "dtype=bf16: did you mean bfloat16?"),
        ("sft launch=fsd2", "launch=fsd2: did you mean fsdp2?"),
        ("sft mask_rates=3", "mask_rates=3: give a list, each item a number above 0 and at most 1"),
        ("sft optim.betas=[0.9]", "optim.betas=[0.9]: give a list of 2, each item a number of at least 0 and below 1"),
        ("sft data=mix data.sources=[a]", "data.sources[0]=a: give a mapping such as {path: …}"),
        (
            "sft data=mix 'data.sources={a: b}'",
            "data.sources={'a': 'b'}: give a list, each item a mapping such as {path: …}",
        ),
        ("sft data=mix 'data.sources=[{path: a, columns: [b]}]'", "data.sources[0].columns=['b']: give a mapping"),
        ("sft data=mix 'data.sources=[{path: a, weight: 0}]'", "data.sources[0].weight=0: give a number above 0"),
        ("sft data=a.jsonl data.held_out=1.5", "data.held_out=1.5: give a share below 1, or a whole number of at le"),
        ("sft decoding.threshold=5", "decoding.threshold=5: confidence is at most 1"),
        (
            "eval decoding=margin decoding.threshold=5",
            "decoding.threshold=5: a margin is at most 1",
        ),
        ("eval decoding=bacd decoding.threshold=0.5", "decoding.threshold=0.5 is to be from decoding.lowest_threshold"),
        ("eval decoding.threshold_by_step=0.5", "decoding.threshold goes from 0.9 to 1.4 by threshold_by_step and"),
        ("eval decoding=static decoding.threshold_by_step=-0.5", "decoding.threshold_by_step and threshold_by_posi"),
        ("sft +model.hidden_size=60", "model.hidden_size=60: give a multiple of twice model.num_attention_heads"),
        ("sft +foo=1", "foo: no such key; "),
        ("sft ++learning_rate=1e-5", "learning_rate: no such key; did you mean optim.lr?"),
        ("sft +stepz=1", "stepz: no such key; did you mean steps?"),
        ("sft +decoding.tempratur=1", "decoding.tempratur: no such key; did you mean temperature?"),
        ("sft name=../../x", "name=../../x is no name of a directory in runs: for one elsewhere give out=DIR"),
        ("sft 'optim.lr=${x}'", "Interpolation key 'x' not found; a text that holds ${…} is written \\${…}"),
        ("sft name=", "name= is no name of a directory in runs"),
        ("rl rl.group_size=1", "rl.group_size=1: an answer is worth what it is beside the others to its problem"),
        ("rl rl.mini_batches=65", "rl.mini_batches=65: there are at most rl.problems=16 groups to cut into parts"),
        ("rl rl.filter=acuracy", "rl.filter=acuracy: did you mean accuracy?"),
        ("rl rl.replay=a rl.rollout_only=true", "rl.replay learns without sampling and rl.rollout_only samples"),
        ("rl rl.rescore=true", "rl.rescore rewards an earlier run's answers anew: say which with rl.replay=DIR"),
        ("rl reward.weights.accuracy=[1]", "reward.weights.accuracy=[1]: give a finite number"),
        ("rl rl=3", "rl=3: give a mapping such as {problems: …}"),
        ("rl algo.clip_low=-1", "algo.clip_low=-1: give a number of at least 0; inf switches it off"),
        ("rl reward=dapo reward.options.soft_overlong.cache=0", "reward.options.soft_overlong.cache=0: give a whole "),
        (
            "dpo model=sdar8b dpo.held_out=1",
            "dpo.held_out is of the problems of dpo.pairs_from: of a file's pairs give data.",
        ),
        ("dpo dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5: give a number of at least 0 and below 0.5"),
        ("dpo dpo.link=sigmoyd", "dpo.link=sigmoyd: did you mean sigmoid?"),
        ("eval limit=0", "limit=0: give a whole number of at least 1, or null"),
        ("eval predictions=a.jsonl samples=0", "samples=0: give a whole number of at least 1"),
        ("generate prompt=a samples=0", "samples=0: give a whole number of at least 1"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_by_its_name(here, words, sentence):
    assert refused(*shlex.split(words)).startswith(sentence)
    assert not (here / "runs").exists()


def test_a_value_is_looked_at_before_another_run_in_the_directory(here):
    out = here / "runs/sft/tiny-arithmetic"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.yaml").write_text("steps: 3\n")
    assert refused("sft", "batch_size=0") == "batch_size=0: give a whole number of at least 1"
    result = CliRunner().invoke(app, ["sft", "model=tiny", "batch_size=3"], env={"HYDRA_FULL_ERROR": "0"})
    assert result.exit_code == 1 and "holds a run with another configuration" in result.stderr


def test_keys_of_what_is_a_mapping_may_be_added(here):
    for command, words in (
        ("rl", ["+reward.weights.repetition=0.5"]),
        ("rl", ["+reward.weights={boxed: 1}"]),
        ("rl", ["+reward.options.boxed={value: 0.2}", "+reward.weights.boxed=1"]),
        ("sft", ["data=file", "data.path=a", "data.columns={question: q}"]),
        ("sft", ["+model.hidden_size=64"]),
        ("sft", ["clip_norm=inf", "skip_norm=0.5", "eval_every=0", "save_every=0", "schedule.warmup=0"]),
    ):
        check_values(command, composed(command, *words))


def test_a_sweep_where_nothing_can_be_written_is_one_sentence(here):
    (here / "runs").write_text("a file, which even root cannot make a directory in")
    said = refused("sft", "-m", "steps=1,2")
    assert said.startswith("runs/sft cannot be written (") or "/runs/sft cannot be written (" in said


def test_evaluating_predictions_looks_at_values_without_torch(here):
    before = set(sys.modules)
    (here / "p.jsonl").write_text('{"index": 0, "completion": "a"}\n')
    cfg = composed("eval", "predictions=p.jsonl")
    loaded = {name for name in ("dirl_cli.rollout.engines", "dirl_cli.models.tiny") if name in before}
    check_values("eval", cfg)
    assert {name for name in ("dirl_cli.rollout.engines", "dirl_cli.models.tiny") if name in sys.modules} == loaded


def test_a_directory_that_is_no_config_tree_says_so(here):
    (here / "d/runs").mkdir(parents=True)
    (here / "d/runs/config.yaml").write_text("steps: 3\n")
    assert refused("sft", "-cd", "d").startswith("d is no config tree: it holds no GROUP/NAME.yaml")
    (here / "d/experiment").mkdir()
    (here / "d/experiment/mine.yaml").write_text("# @package _global_\nsteps: -3\n")
    assert refused("sft", "-cd", "d", "model=tiny", "experiment=mine").startswith(
        "steps=-3: give a whole number of at least 1"
    )


def test_a_terminal_without_our_letters_gets_question_marks():
    shown = TextIOWrapper(BytesIO(), encoding="ascii")
    replace_unencodable(shown, StringIO())
    print("step 1 · π", file=shown, flush=True)
    assert shown.buffer.getvalue() == b"step 1 ? ?\n"


def test_bytes_that_are_no_letters_here_are_told(here):
    word = b"name=caf\xc3\xa9".decode("ascii", errors="surrogateescape")  # as a shell in LC_ALL=POSIX hands it over
    assert refused("sft", word).endswith("start it with LC_ALL=C.UTF-8")


def test_a_number_may_be_larger_than_any_float():
    assert Range(at_least=1).holds(10**400) and not Range(at_most=1).holds(10**400)
