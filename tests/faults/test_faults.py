"""Whatever happens to a run, the same command goes on and ends with the same bytes. `make test-faults` tells all."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch

from dirl_cli.cli.run_dir import Said, open_run
from dirl_cli.errors import DirlError
from dirl_cli.reward.grading import Grader
from dirl_cli.training.stored_checkpoint import complete_checkpoints, damage
from tests.faults.faulty_reward import due
from tests.faults.trials import SFT, TRACEBACK, Child, config, finished, result, save_random_model
from tests.helpers.asked import asked

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
KILLS = 30


@pytest.fixture(scope="module", autouse=True)
def flags(tmp_path_factory) -> Path:
    """Where faults are asked for."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("faults")
    os.environ["FAULTS"] = str(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By command: the override for its model, an undisturbed run, and the seconds that took."""
    found = {}
    for name, scale in (("sft", 1.0), ("rl", 8.0)):  # sharp, so that answers differ in length
        directory = tmp_path_factory.mktemp("undisturbed")
        word = save_random_model(directory, scale)
        child = Child(name, config(name, word), directory / "run")
        assert child.end() == 0, child.told
        found[name] = word, directory / "run", child.seconds
    return found


def half_written(out: Path) -> bool:
    return any(out.glob(".*.partial")) or any(out.glob("checkpoints/.*.partial"))


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_killed_at_random_moments(name, in_background, undisturbed, tmp_path, tell):
    word, through, seconds = undisturbed[name]
    cfg = config(name, word, f"async_checkpoints={in_background}")
    moments, expected = random.Random(name), result(through)
    survived = early = saving = 0
    for kill in range(KILLS // 2):
        for attempt in count():
            out = tmp_path / f"{kill}-{attempt}"
            child = Child(name, cfg, out)
            child.ends_within((kill + moments.random()) / (KILLS // 2) * seconds)
            if child.kill():
                break
            seconds = child.seconds  # the machine has become faster
        early += not complete_checkpoints(out / "checkpoints")
        saving += half_written(out)
        survived += finished(name, cfg, out) == expected
        shutil.rmtree(out)
    how = "written in the background" if in_background else "written at once"
    when = f"{early} before the first checkpoint, {saving} while saving"
    tell(f"kill -9 at random moments of {name}, checkpoints {how} ({when})", KILLS // 2, survived)


# What draws masks of its own, follows the policy with its reference, or learns values beside it.
OBJECTIVES = {
    "dipo with a value model": ("algo=dipo", "critic=model", "critic.lr=1e-2", "rl.mini_batches=2"),
    "spg": ("algo=spg", "rl.epochs=2"),
    "coupled_grpo with a moving reference": ("algo=coupled_grpo", "algo.reference_every=2", "rl.epochs=2"),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_killed_between_its_steps_goes_on_to_the_same_bytes(objective, undisturbed, tmp_path, tell):
    cfg = config("rl", undisturbed["rl"][0], *OBJECTIVES[objective])
    through = Child("rl", cfg, tmp_path / "through")
    assert through.end() == 0, through.told
    expected = result(tmp_path / "through")
    kept = {file.stem for file in complete_checkpoints(tmp_path / "through/checkpoints")[-1].glob("*.safetensors")}
    assert ("critic_optimizer" in kept, "reference" in kept) == ("value" in objective, "moving" in objective)

    moments, steps, survived = random.Random(objective), (1, 2, 3, 4), 0
    for step in steps:
        out = tmp_path / str(step)
        child = Child("rl", cfg, out).wait_for(f"step {step}/")
        child.ends_within(moments.random() * through.seconds / 10)  # some time in the next step, or while it saves
        survived += child.kill() and finished("rl", cfg, out) == expected
    tell(f"kill -9 in the midst of {objective}", len(steps), survived)


@contextmanager
def disk(path: Path, kilobytes: int):
    """A file system of its own with so much room."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk(in_background, undisturbed, tmp_path, tell):
    word, through, _ = undisturbed["sft"]
    cfg = config("sft", word, "keep_checkpoints=0", f"async_checkpoints={in_background}")
    expected, survived, sizes = result(through), 0, range(100, 2100, 200)
    for kilobytes in sizes:
        path = tmp_path / str(kilobytes)
        with disk(path, kilobytes):
            child = Child("sft", cfg, path / "run", before=int)
            code = child.end()
            told = f"code {code}: {child.told}"
            whole = not any(map(damage, complete_checkpoints(path / "run/checkpoints")))
            in_a_sentence = code == 1 and "make room" in child.told.splitlines()[-1]
            subprocess.run(["mount", "-o", "remount,size=100m", path], check=True)
            found = finished("sft", cfg, path / "run")
            good = (code == 0 or in_a_sentence) and whole and found == expected
            assert good, told
            survived += good
    tell(f"the disk is full{' while written in the background' * in_background}", len(sizes), survived)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flipped(file: Path) -> None:
    """A random bit is another."""
    content = bytearray(file.read_bytes())
    place = random.Random(file.name).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [truncated, emptied, flipped, Path.unlink])
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_a_damaged_checkpoint(name, harm, undisturbed, tmp_path, tell):
    word, through, _ = undisturbed[name]
    expected, survived = result(through), 0
    files = [file.name for file in complete_checkpoints(through / "checkpoints")[-1].iterdir()]
    for file in files:
        out = tmp_path / file
        shutil.copytree(through, out)
        shutil.rmtree(out / "model")
        harm(complete_checkpoints(out / "checkpoints")[-1] / file)
        child = Child(name, config(name, word), out)
        survived += child.end() == 0 and "is damaged" in child.told and result(out) == expected
    what = "missing" if harm is Path.unlink else harm.__name__
    tell(f"a file of the last checkpoint of {name} is {what}", len(files), survived)


@pytest.mark.parametrize(("number", "expected_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", ["sft", "rl"])
def test_asked_to_stop(name, number, expected_code, undisturbed, tmp_path, tell):
    word, through, _ = undisturbed[name]
    cfg = config(name, word, "save_every=0")
    expected, survived, slowest = result(through), 0, 0.0
    for step in (1, 2, 3):
        out = tmp_path / str(step)
        child = Child(name, cfg, out).wait_for(f"step {step}/")
        asked = time.perf_counter()
        child.send(number)
        code = child.end()
        slowest = max(slowest, time.perf_counter() - asked)
        said = "stopped after step" in child.told and len(complete_checkpoints(out / "checkpoints")) == 1
        survived += code == expected_code and said and slowest < 30 and finished(name, cfg, out) == expected
    asks = f"{number.name} in {name}: it saves and exits {expected_code} (after {slowest:.1f} s at most)"
    tell(asks, 3, survived)


def test_the_command_that_is_asked_to_stop_exits_with_0(undisturbed, tmp_path, tell):
    words = [undisturbed["sft"][0]] + [word for word in SFT if not word.startswith("steps=")]
    command = [Path(sys.executable).with_name("dirl"), "sft", *words, "steps=100000", f"out={tmp_path}/run"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("run/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.05)
        with (
            pytest.raises(DirlError, match="is in use by another process"),
            open_run(tmp_path / "run", config("sft"), Said([], []), "auto"),
        ):
            pass
        process.terminate()
        told = process.communicate(timeout=30)[1]
    assert "dirl sft: stopped after step" in told
    tell("SIGTERM to `dirl sft`; before it, a second run in its directory", 2, 2 * (process.returncode == 0))


@pytest.mark.parametrize(("every", "factor"), [(10, float("nan")), (10, 1e30), (10, 300.0)])
def test_a_loss_that_is_not_finite_or_a_gradient_that_explodes(every, factor, undisturbed, tmp_path, tell):
    words = [
        undisturbed["sft"][0],
        "masking._target_=tests.faults.faulty.Masking",
        f"+masking.every={every}",
        f"+masking.factor={factor}",
    ]
    cfg = config("sft", "masking=complementary", *words, "skip_norm=50", "max_skipped=9", "steps=12")
    through = finished("sft", cfg, tmp_path / "through")
    skipped = [line["step"] for line in through["metrics"] if line.get("skipped")]
    assert 2 <= len(skipped) <= 10
    child = Child("sft", cfg, tmp_path / "killed").wait_for(f"step {skipped[1]}/")
    assert child.kill()
    survived = finished("sft", cfg, tmp_path / "killed") == through
    whats = {1e30: "a gradient that is not finite", 300.0: "a gradient longer than skip_norm"}
    what = whats.get(factor, "a loss of nan")
    tell(f"{what}: the update is skipped, also by the run that goes on", len(skipped), survived * len(skipped))


def test_losses_that_stay_nan_end_the_run_in_a_sentence(undisturbed, tmp_path, tell):
    words = [
        undisturbed["sft"][0],
        "masking._target_=tests.faults.faulty.Masking",
        "+masking.every=1",
        "+masking.factor=nan",
        "max_skipped=3",
    ]
    child = Child("sft", config("sft", "masking=complementary", *words), tmp_path / "run")
    survived = int(child.end() == 1 and "at step 4, number 4 in a row to be skipped" in child.told)
    tell("every loss is nan: the run ends with a sentence after max_skipped", 1, survived)


def test_a_reward_that_fails(undisturbed, flags, tmp_path, tell):
    word, _, _ = undisturbed["rl"]
    cfg = config(
        "rl", word, "+reward.weights={soft_overlong: 1.0, tests.faults.faulty_reward.reward: 1.0}", "reward.timeout=2"
    )
    through = finished("rl", cfg, tmp_path / "through")
    faults = {"hang": "took longer than 2 s", "exit": "code 3", "kill": "code -9", "raise": "RuntimeError: a fault"}
    survived = 0
    for fault, sentence in faults.items():
        child = Child("rl", cfg, tmp_path / fault).wait_for("step 2/")
        (flags / fault).touch()
        code = child.end()
        told = code == 1 and sentence in child.told
        assert told, child.told
        survived += told and finished("rl", cfg, tmp_path / fault) == through
    tell("a reward hangs, exits, is killed or raises", len(faults), survived)


def test_a_grading_process_that_is_killed(tell):
    with Grader(workers=1) as grader:
        right = 0
        for n in range(5):
            grader.submit(n, asked(r"\frac{1}{2}"), rf"\boxed{{\frac{{{n + 1}}}{{{2 * n + 2}}}+0}}")
            if n:
                os.kill(grader._processes[0]._process.pid, signal.SIGKILL)
            right += sum(credit == 1 for _, credit in grader.rest())
    tell("a grading process is killed", 5, right)


def test_a_sampler_that_raises_in_mid_rollout(undisturbed, flags, tmp_path, tell):
    word, _, _ = undisturbed["rl"]
    cfg = config("rl", word, "decoding.strategy=tests.faults.faulty.strategy")
    through, survived = finished("rl", cfg, tmp_path / "through"), 0
    for step in (1, 4):
        out = tmp_path / str(step)
        child = Child("rl", cfg, out).wait_for(f"step {step}/")
        (flags / "sampler").touch()
        failed = child.end() == TRACEBACK and "RuntimeError: a fault in mid-rollout" in child.told
        kept = step <= int(complete_checkpoints(out / "checkpoints")[-1].name[5:])
        survived += failed and kept and finished("rl", cfg, out) == through
    assert not due("sampler")
    tell("the sampler raises in mid-rollout", 2, survived)


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_a_clock_that_jumps(name, undisturbed, tmp_path, tell):
    word, through, _ = undisturbed[name]
    began = time.perf_counter()
    child = Child(name, config(name, word), tmp_path / "run", before=jumping)
    assert child.end() == 0, child.told
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    seconds = [value for line in map(json.loads, lines.splitlines()) for key, value in line.items() if "seconds" in key]
    sane = all(0 <= value < time.perf_counter() - began for value in seconds)
    tell(f"the clock jumps by years in {name}", 1, int(sane and result(tmp_path / "run") == result(through)))


def jumping() -> None:
    """Make the wall clock jump at every look."""
    moments = random.Random(0)
    time.time = lambda: moments.uniform(-1e7, 3e9)
