"""Run directories: continued by the same configuration, refused to another one, held by one process, never deleted."""

import fcntl
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from threading import Timer

import pytest
from omegaconf import OmegaConf

from dirl_cli.cli.build import find_class
from dirl_cli.cli.former import MODULES, todays_word
from dirl_cli.cli.run_dir import Said, environment, git_state, open_run
from dirl_cli.errors import DirlError

CONFIG = {"seed": 0, "optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "name": "a", "gpus": 1, "steps": None}
NOTHING = Said(values=[], choices=[])


def start(out, resume="auto", **changes):
    """Open a run as its command does, and leave a file in it."""
    said = Said(values=changes.keys(), choices=[])
    with open_run(out, OmegaConf.create(CONFIG | changes), said, resume):
        (out / "work").write_text("done")


def test_the_same_configuration_continues(tmp_path):
    start(tmp_path / "run")
    start(tmp_path / "run")
    assert OmegaConf.load(tmp_path / "run/config.yaml") == CONFIG


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    start(tmp_path / "run")
    with pytest.raises(DirlError) as error:
        start(tmp_path / "run", optim={"lr": 0.2, "momentum": 0.9}, steps=5)
    told = "optim.lr: 0.1 → 0.2, optim.betas: [0.9, 0.95] → absent, steps: null → 5, optim.momentum: absent → 0.9"
    assert told in str(error.value)
    assert "name=" in str(error.value) and "resume=never" in str(error.value)
    assert OmegaConf.load(tmp_path / "run/config.yaml") == CONFIG


def test_at_most_five_differences_are_told(tmp_path):
    start(tmp_path / "run")
    with pytest.raises(DirlError, match="and 2 more"):
        start(tmp_path / "run", **{f"key{n}": n for n in range(7)})


def test_a_key_that_a_run_lacks_has_its_default_unless_the_command_says_it(tmp_path):
    out = tmp_path / "run"
    start(out, reward={"name": "fair"})
    new = OmegaConf.create(CONFIG | {"reward": {"name": "fair", "scale": 2}, "critic": {"width": 8}})
    for said, told in [
        (Said(["reward.scale"], []), "reward.scale: absent → 2"),
        (Said(["reward"], []), "reward.scale: absent → 2"),
        (Said([], ["critic"]), "critic.width: absent → 8"),
    ]:
        with pytest.raises(DirlError, match=rf"\({told}\)"), open_run(out, new, said, "auto"):
            pass

    with open_run(out, new, Said(values=["seed"], choices=["reward"]), "auto"):
        pass
    assert OmegaConf.load(out / "config.yaml") == new


def test_a_weight_that_a_run_lacks_is_none(tmp_path):
    start(tmp_path / "run", reward={"weights": {"accuracy": 1.0}})
    both = OmegaConf.create(CONFIG | {"reward": {"weights": {"accuracy": 1.0, "speed": 0.1}}})
    said = Said(values=[], choices=["reward"])
    with (
        pytest.raises(DirlError, match=r"reward\.weights\.speed: absent → 0\.1"),
        open_run(tmp_path / "run", both, said, "auto"),
    ):
        pass


def test_keys_that_do_not_change_the_result_may_change(tmp_path):
    start(tmp_path / "run")
    start(tmp_path / "run", name="b", gpus=4, logger={"_target_": "mine"})
    assert OmegaConf.load(tmp_path / "run/config.yaml").gpus == 4  # worker processes read this file


def test_a_run_goes_on_although_its_classes_have_moved(tmp_path):
    start(tmp_path / "run", algo={"_target_": "dirl_cli.algo.objective.Objective"})
    start(tmp_path / "run", algo={"_target_": "dirl_cli.rl.objective.Objective"})


def test_another_choice_is_told_by_the_names_of_the_classes(tmp_path):
    start(tmp_path / "run", masking={"_target_": "dirl_cli.diffusion.masking.Band"}, mine={"_target_": "a.Same"})
    with pytest.raises(DirlError, match=r"\(masking: Band → TraceWindows, mine\._target_: a\.Same → b\.Same\)"):
        start(
            tmp_path / "run",
            masking={"_target_": "dirl_cli.diffusion.reveal_order.TraceWindows"},
            mine={"_target_": "b.Same"},
        )


def test_a_class_is_found_where_an_earlier_version_had_it():
    for module, name in [("algo.views", "Trace"), ("models.causal", "FromCausal"), ("training.schedule", "Cosine")]:
        assert find_class(f"dirl_cli.{module}.{name}", "group").__name__ == name
    for module in MODULES.values():
        import_module(module)


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ("models.checkpoint.Checkpoint", "SavedModel"),  # from the first version, moved and renamed
        ("models.load.Checkpoint", "SavedModel"),
        ("models.lora.Lora", "LoraFinetune"),
        ("models.peft.Lora", "LoraFinetune"),
        ("models.lora.Whole", "FullFinetune"),
        ("diffusion.masking.Cosine", "CosineRate"),
        ("diffusion.masking.Count", "CountPerBlock"),
        ("reward.scoring.Rewards", "RewardSettings"),
    ],
)
def test_a_class_is_found_under_the_name_that_an_earlier_version_gave_it(tmp_path, earlier, today):
    found = find_class(f"dirl_cli.{earlier}", "group")
    assert found.__name__ == today
    start(tmp_path / "run", part={"_target_": f"dirl_cli.{earlier}"})
    start(tmp_path / "run", part={"_target_": f"{found.__module__}.{today}"})


def test_a_run_goes_on_where_a_number_was_true_or_false(tmp_path):
    assert [todays_word(f"rl.async_rollout={value}") for value in ("true", "False", "2")] == [
        "rl.async_rollout=1",
        "rl.async_rollout=0",
        "rl.async_rollout=2",
    ]
    assert todays_word("rl.train_tail=true") == "rl.train_tail=true"
    start(tmp_path / "run", rl={"async_rollout": True})
    start(tmp_path / "run", rl={"async_rollout": 1})
    with pytest.raises(DirlError, match=r"rl\.async_rollout: 1 → 2"):
        start(tmp_path / "run", rl={"async_rollout": 2})


def test_never_sets_the_old_run_aside(tmp_path):
    start(tmp_path / "run")
    for aside in ("run~1", "run~2"):
        start(tmp_path / "run", resume="never", seed=1)
        assert (tmp_path / aside / "work").read_text() == "done"
    assert OmegaConf.load(tmp_path / "run~1/config.yaml").seed == 0


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from omegaconf import OmegaConf\n"
        "from dirl_cli.cli.run_dir import Said, open_run\n"
        "with open_run(Path(sys.argv[1]), OmegaConf.create({}), Said([], []), 'auto'):\n"
        "    print('open', flush=True)\n"
        "    input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        for resume in ("auto", "never"):
            with pytest.raises(DirlError, match="in use by another process"):
                start(tmp_path / "run", resume)
        other.kill()
    start(tmp_path / "run", resume="never")  # a killed process holds nothing


def test_who_looks_at_a_lock_for_a_moment_keeps_no_run_from_starting(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").touch()
    with (tmp_path / "run/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        letting_go = Timer(0.1, fcntl.flock, (lock, fcntl.LOCK_UN))
        letting_go.start()
        start(tmp_path / "run")
        letting_go.join()
    assert (tmp_path / "run/work").exists()


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DirlError, match="out="):
        start(tmp_path / "file" / "run")


def test_the_environment_is_written_down(tmp_path):
    start(tmp_path / "run")
    written = json.loads((tmp_path / "run/environment.json").read_text())
    assert written == environment()
    assert written["packages"]["torch"].startswith("2.")
    assert written["command"]


def test_git_tells_the_commit_and_whether_files_differ(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(tmp_path) is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and not state["dirty"]
    Path(tmp_path, "new").write_text("")
    assert git_state(tmp_path)["dirty"]


def test_a_mistyped_resume_is_refused_before_anything_is_touched(tmp_path):
    run = open_run(tmp_path / "run", OmegaConf.create({"a": 1}), NOTHING, "nevr")
    with pytest.raises(DirlError, match="resume=nevr: there is no such checkpoint; give auto, never or the path"), run:
        pass
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_nothing_and_takes_nothing_away(tmp_path):
    with pytest.raises(DirlError, match="no"), open_run(tmp_path / "run", OmegaConf.create(CONFIG), NOTHING, "auto"):
        raise DirlError("no")
    assert not (tmp_path / "run").exists()
    start(tmp_path / "run")
    with pytest.raises(DirlError, match="no"), open_run(tmp_path / "run", OmegaConf.create(CONFIG), NOTHING, "auto"):
        raise DirlError("no")
    assert (tmp_path / "run/work").read_text() == "done"


def test_where_a_runs_servers_failed_their_logs_stay_and_another_configuration_may_start(tmp_path):
    with pytest.raises(DirlError, match="no"), open_run(tmp_path / "run", OmegaConf.create(CONFIG), NOTHING, "auto"):
        (tmp_path / "run/servers").mkdir()
        raise DirlError("no")
    assert (tmp_path / "run/servers").is_dir()
    with open_run(tmp_path / "run", OmegaConf.create({**CONFIG, "seed": 7}), NOTHING, "auto"):
        pass
