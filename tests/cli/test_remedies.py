"""What a sentence advises works: the words it gives are run."""

import re
import shlex
import tomllib

import pytest

from dirl_cli import hub
from dirl_cli.cli.schema import SCHEMAS
from dirl_cli.commands.generate import UNTRAINED
from dirl_cli.errors import DirlError, pip_install
from dirl_cli.text import counted, shell_word
from tests.helpers.command_line import dirl, refusal
from tests.helpers.paths import ROOT


@pytest.mark.parametrize(
    ("words", "advice", "key", "value"),
    [
        (["sft", "--steps", "10"], "`dirl sft (.+)`", "steps", 10),
        (["sft", "--steps", "10", "--lr", "1e-3", "--dry-run"], "`dirl sft (.+)`", "optim.lr", 1e-3),
        (
            ["sft", "--learning-rate=1e-3", "--model", "runs/a b/model"],
            "`dirl sft (.+)`",
            "model.path",
            "runs/a b/model",
        ),
        (["eval", "model=[tiny,sdar8b]"], "`(-m .+)` runs each", "model.name", "sdar8b"),
        (["sft", "mask_rates=0.5,1"], "write (.+) for a list", "mask_rates", [0.5, 1.0]),
        (["sft", "data=a.json", "data.split=train[:5%]"], "as in (.+)", "data.split", "train[:5%]"),
        (["sft", "keep_best=(4'"], "as in (.+)", "keep_best", "(4'"),
        (["sft", "data=[a.jsonl,b/c d.jsonl]"], "a mixture: (.+)", "data.sources.1.path", "b/c d.jsonl"),
    ],
)
def test_the_words_that_are_advised_work(jobs, words, advice, key, value):
    command, *given = words
    advised = re.search(advice, refusal(*words))
    others = [word for word in given[:-1] if advice == "as in (.+)"]
    assert advised and dirl(command, *others, *shlex.split(advised[1])).exit_code == 0
    found = jobs[-1]
    for part in key.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == value


@pytest.mark.parametrize(
    ("words", "count"),
    [(["eval", "bench=math500,gsm8k"], 2), (["sft", "model=tiny,tiny_sft"], 2), (["sft", "seed=1,2,3"], 3)],
)
def test_several_values_are_run_with_m_and_no_list_is_advised_where_there_is_none(jobs, words, count):
    assert refusal(*words).endswith("add -m to run each of them")
    assert dirl(words[0], "-m", *words[1:]).exit_code == 0
    assert len(jobs) == count


def test_data_of_an_evaluation_belong_to_the_likelihood(jobs):
    assert (
        refusal("eval", "data=sudoku")
        == "dirl eval: data is read with bench=likelihood alone: give that too, or leave data out"
    )
    assert dirl("eval", "data=sudoku", "bench=likelihood").exit_code == 0
    assert (jobs[-1]["data"]["name"], jobs[-1]["bench"]["name"]) == ("sudoku", "likelihood-sudoku")


@pytest.mark.parametrize("word", ["step=1,2", "optim.lrr=1e-3,2e-3", "maskng=cosine,band"])
def test_several_values_of_a_mistyped_key_are_told_as_one_is(jobs, word):
    key, _, values = word.partition("=")
    assert refusal("sft", word) == refusal("sft", f"{key}={values.partition(',')[0]}")
    assert "no such key; did you mean" in refusal("sft", word)


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [("eval", "batch_size", 4), ("sft", "learning_rate", 0.1), ("sft", "dataset", "gsm.json"), ("eval", "n", 3)],
)
def test_a_key_of_another_toolkit_is_told_as_ours(jobs, command, key, value):
    advised = re.search(r"did you mean (.+)\?$", refusal(command, f"{key}={value}"))
    assert advised and dirl(command, f"{advised[1]}={value}").exit_code == 0


@pytest.mark.parametrize("command", SCHEMAS)
def test_cfg_job_prints_every_key(command):
    sentence = refusal(command, "xyzzy=1")
    words = re.search("`dirl (.+)` prints every key", sentence)
    assert words and words[1] == f"{command} --cfg job"
    assert dirl(*words[1].split()).exit_code == 0


def test_packages_are_installed_by_their_own_names():
    """Those of pyproject.toml: `dirl` itself is on no index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, wanted in project["optional-dependencies"].items():
        pip, install, *packages = shlex.split(pip_install(extra))
        assert (pip, install) == ("pip", "install")
        assert sorted(map(name_of, packages)) == sorted(map(name_of, wanted))


def name_of(requirement):
    return re.split("[<>=]", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_names_its_package(jobs, launcher, monkeypatch):
    if dirl("sft", f"hydra/launcher={launcher}").exit_code == 0:
        pytest.skip("it is installed")
    assert f"hydra-{launcher.partition('_')[0]}-launcher" in refusal("sft", f"hydra/launcher={launcher}")


def test_a_path_that_does_not_exist_is_told_as_a_path(here):
    (here / "mine").mkdir()
    for path in ("runs/nope", "mine/nope"):
        with pytest.raises(DirlError, match=f"^{path} does not exist: check the path$"):
            hub.local_snapshot(path, "model")
    with pytest.raises(DirlError, match="run `dirl download me/nope` first"):
        hub.local_snapshot("me/nope", "model")


def test_a_path_in_a_sentence_can_be_pasted(jobs):
    odd = "runs/sft/my run, v=1 'a' $b/model"
    assert dirl("eval", *shlex.split(shell_word("model", odd))).exit_code == 0
    assert jobs[-1]["model"]["path"] == odd


def test_the_model_that_an_untrained_one_is_told_of_is_what_sft_leaves(jobs):
    command, remedy = re.findall("`(.+?)`", UNTRAINED)
    assert dirl(*command.split()[1:]).exit_code == 0
    assert remedy == f"model={jobs[-1]['out']}/model"


def test_one_of_a_thing_is_counted_without_an_s():
    assert [counted(n, "row") for n in (0, 1, 2, 7307)] == ["0 rows", "1 row", "2 rows", "7,307 rows"]
