"""Checkpoints: what goes in comes out bit for bit, in any number of processes, and damage is told, not loaded."""

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dirl_cli.errors import DirlError
from dirl_cli.files import atomic_directory
from dirl_cli.models.peft import trainable_parameters
from dirl_cli.training.checkpoint import RunCheckpoints, require_measured
from dirl_cli.training.export import save_model
from dirl_cli.training.optim import AdamW, Muon
from dirl_cli.training.shards import Shard, read_shards, write_shards
from dirl_cli.training.stored_checkpoint import (
    SUMS,
    damage,
    find_checkpoint,
    load_checkpoint,
    optimizer_states,
    require_same_run,
)
from dirl_cli.types import STATE
from tests.helpers.processes import run_together
from tests.helpers.small import small_lm

Run = tuple[nn.Module, list[torch.optim.Optimizer]]
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
ADAMW = AdamW(1e-2, (0.9, 0.98), 1e-8, 0.01)
MUON = Muon(0.02, 0.95, 4e-3, (0.9, 0.98), 1e-8, 0.01)


def start(seed: int = 0, optim: AdamW | Muon = MUON) -> Run:
    """A fresh tied model and its optimizers."""
    model = small_lm(seed=seed, scale=1.0).model
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model, optim.build(model)


def train(run: Run, steps: int) -> None:
    model, optimizers = run
    for step in range(steps):
        ids = torch.arange(8)[None] + step
        model(ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def checkpoints(directory: Path, keep: int = 2, **options) -> RunCheckpoints:
    return RunCheckpoints(directory / "checkpoints", Accelerator(cpu=True), keep, **options)


def saved(directory: Path, steps: int = 1) -> tuple[Path, Run]:
    """The checkpoint of a run of some steps."""
    run = start()
    train(run, steps)
    return checkpoints(directory).save(steps, *run, {}), run


def begin(directory: Path, resume: str = "auto") -> tuple[Path | None, list[str]]:
    """Where a run in a directory goes on, and what it says."""
    told: list[str] = []
    return checkpoints(directory).begin(resume, told.append), told


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_never_stopped(tmp_path, in_background):
    through = start()
    train(through, 2)
    kept = checkpoints(tmp_path, in_background=in_background)
    path = kept.save(2, *through, {})
    train(through, 2)  # while it may be written
    kept.wait()
    resumed = start(seed=1)
    assert load_checkpoint(path, *resumed)["step"] == 2
    train(resumed, 2)
    assert same(through[0], resumed[0])


def test_saving_changes_nothing_in_the_run_that_saves(tmp_path):
    saving, other = start(), start()
    for steps in (0, 1):  # before the optimizers have any state, and after
        checkpoints(tmp_path).save(steps, *saving, {})
        for run in (saving, other):
            train(run, 1)
    assert same(saving[0], other[0])


def test_a_checkpoint_from_before_the_first_update_begins_the_same_run(tmp_path):
    through, resumed = start(), start(seed=1)
    load_checkpoint(checkpoints(tmp_path).save(0, *through, {}), *resumed)
    for run in (through, resumed):
        train(run, 2)
    assert same(through[0], resumed[0])


def test_a_tied_parameter_is_written_once_and_its_optimizer_state_by_name(tmp_path):
    path, _ = saved(tmp_path)
    assert "lm_head.weight" not in load_file(path / MODEL)
    states = load_file(path / OPTIMIZER)
    assert "model.layers.0.mlp.up_proj.weight.momentum_buffer" in states
    assert states["model.embed_tokens.weight.exp_avg"].shape == (50, 32)


def test_what_does_not_learn_is_not_written_and_stays_as_it_is(tmp_path):
    model, _ = start()
    model.model.embed_tokens.requires_grad_(False)
    run = model, ADAMW.build(model)
    train(run, 1)
    path = checkpoints(tmp_path).save(1, *run, {})
    assert "model.embed_tokens.weight" not in load_file(path / MODEL)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(7)
    load_checkpoint(path, *run)
    assert model.model.embed_tokens.weight.unique().tolist() == [7]


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (directory / "checkpoints").iterdir())


def test_the_oldest_go_and_the_latest_is_found(tmp_path):
    run = start()
    train(run, 1)
    assert begin(tmp_path) == (None, [])
    kept = checkpoints(tmp_path)
    for step in (5, 10, 1_000_000):
        kept.save(step, *run, {})
    assert steps_in(tmp_path) == [10, 1_000_000]
    assert begin(tmp_path) == (kept.directory / "step-1000000", [])


def test_the_best_is_kept_also_by_the_run_that_goes_on(tmp_path):
    run = start()
    for goes_on, measured in ((False, [0.2, 0.5, None, 0.5]), (True, [0.4, float("nan"), 0.6, 0.1])):
        kept = checkpoints(tmp_path, keep=1, best="greedy_accuracy")
        kept.begin("auto", print)
        for step, value in enumerate(measured, start=1 + 4 * goes_on):
            metrics = {} if value is None else {"greedy_accuracy": value}
            is_best = kept.is_best(metrics)
            kept.save(step, *run, metrics)
            assert is_best == (step in (1, 2, 7))
        assert steps_in(tmp_path) == ([7, 8] if goes_on else [2, 4])


def test_a_loss_is_best_where_it_is_lowest(tmp_path):
    run = start()
    kept = checkpoints(tmp_path, keep=1, best="validation_loss")
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0], start=1):
        kept.save(step, *run, {"validation_loss": loss})
    assert steps_in(tmp_path) == [2, 4]


def test_the_best_by_what_is_not_measured_is_refused():
    require_measured(None, [])
    require_measured("loss", ["loss"])
    with pytest.raises(DirlError, match=r"keep_best=valdation_loss is not .*: did you mean validation_loss"):
        require_measured("valdation_loss", ["loss", "validation_loss"])


def test_what_a_crash_left_half_written_is_not_a_checkpoint_and_is_removed(tmp_path):
    whole, _ = saved(tmp_path)
    kept = checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_directory(kept.directory / "step-000010") as partial:
        (partial / MODEL).write_bytes(b"half")
        assert kept.begin("auto", print) == whole
        raise KeyboardInterrupt
    (kept.directory / ".step-000015.partial").mkdir()
    (kept.directory / "step-000020").mkdir()
    assert begin(tmp_path) == (whole, [])
    assert not (kept.directory / ".step-000015.partial").exists()


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def flipped(file: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [truncated, emptied, flipped, Path.unlink])
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, SUMS])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(tmp_path, name, harm):
    run = start()
    kept = checkpoints(tmp_path)
    good, bad = kept.save(1, *run, {}), kept.save(2, *run, {})
    harm(bad / name)
    found, told = begin(tmp_path)
    assert found == good
    [sentence] = told
    assert sentence.startswith(f"{bad} is damaged (") and name in sentence
    assert sorted(path.name for path in kept.directory.iterdir()) == ["step-000001", "step-000002.damaged"]
    assert begin(tmp_path) == (good, [])


def test_every_bit_of_the_checksums_matters(tmp_path):
    path, _ = saved(tmp_path)
    content = (path / SUMS).read_bytes()
    for place in range(0, len(content), 7):
        for bit in (1, 16, 128):
            (path / SUMS).write_bytes(bytes(byte ^ bit * (i == place) for i, byte in enumerate(content)))
            assert damage(path), (place, bit)
    (path / SUMS).write_bytes(content)
    assert damage(path) is None


def test_without_a_good_checkpoint_nothing_is_begun_anew_unasked(tmp_path):
    path, _ = saved(tmp_path)
    flipped(path / MODEL)
    with pytest.raises(DirlError, match=f"{path} is damaged .*begin anew with resume=never"):
        begin(tmp_path)
    assert path.exists()


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path):
    path, _ = saved(tmp_path / "other")
    assert begin(tmp_path, str(path)) == (path, [])
    flipped(path / OPTIMIZER)
    with pytest.raises(DirlError, match=f"{path} is damaged .*{OPTIMIZER}.*: give resume= another checkpoint"):
        begin(tmp_path, str(path))
    assert path.exists()


def test_a_checkpoint_of_another_model_or_of_other_optimizers_is_refused(tmp_path):
    path, (model, optimizers) = saved(tmp_path)
    with pytest.raises(DirlError, match="was written by Muon and AdamW, not AdamW: give the optim= of its run"):
        load_checkpoint(path, *start(optim=ADAMW))
    wider = nn.ModuleDict({name.replace(".", "-"): nn.Linear(2, 2) for name, _ in model.named_parameters()})
    with pytest.raises(DirlError, match=r"holds .* not at all: it is a checkpoint of another model"):
        load_checkpoint(path, wider, optimizers)
    other = small_lm(scale=1.0).model
    other.resize_token_embeddings(60)
    with pytest.raises(DirlError, match=r"weight with shape \(50, 32\), not \(60, 32\): it is a checkpoint of another"):
        load_checkpoint(path, other, MUON.build(other))


def noted(directory: Path, **state) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / STATE).write_text(json.dumps({"step": 1, **state}))
    return directory


def test_a_checkpoint_of_the_other_command_or_beside_other_weights_is_refused(tmp_path):
    path = noted(tmp_path / "now", command="rl", base_fingerprint="3f", updates=1)
    require_same_run(path, "rl", "3f")
    require_same_run(path, "rl", None)  # all weights are in the checkpoint
    with pytest.raises(DirlError, match=r"of `dirl rl`, which `dirl sft` cannot resume: .* give model=.*now"):
        require_same_run(path, "sft", None)
    with pytest.raises(DirlError, match=r"weights differ from those that the run of .*now started from: restore them"):
        require_same_run(path, "rl", "4a")


def test_checkpoints_from_before_commands_were_noted_are_told_apart_too(tmp_path):
    reinforced = noted(tmp_path / "reinforced", updates=1, began_as="3f")
    adapted, whole = noted(tmp_path / "adapted", beside="3f"), noted(tmp_path / "whole", beside=None)
    require_same_run(reinforced, "rl", "3f")
    require_same_run(adapted, "sft", "3f")
    require_same_run(whole, "sft", None)
    for path, command, fingerprint in ((reinforced, "sft", "3f"), (adapted, "rl", "3f"), (adapted, "sft", "4a")):
        with pytest.raises(DirlError):
            require_same_run(path, command, fingerprint)


def test_resume_takes_a_checkpoint_or_the_directory_of_a_run(tmp_path):
    path, _ = saved(tmp_path, steps=7)
    assert find_checkpoint(str(path)) == find_checkpoint(str(tmp_path)) == path
    assert find_checkpoint("auto") is None and find_checkpoint("never") is None
    with pytest.raises(DirlError, match="holds no checkpoint"):
        find_checkpoint(str(tmp_path / "elsewhere"))


def test_a_checkpoint_is_tensors_json_and_checksums_that_other_tools_read(tmp_path):
    path, run = saved(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == [SUMS, MODEL, OPTIMIZER, STATE]
    state = json.loads((path / STATE).read_text())
    assert state == {"step": 1, "optimizers": ["Muon", "AdamW"], "measured": {}}
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=path).returncode == 0
    again = checkpoints(tmp_path / "again").save(1, *run, {})
    assert (again / SUMS).read_text() == (path / SUMS).read_text()


def test_a_full_disk_is_told_in_a_sentence_and_costs_no_earlier_checkpoint(tmp_path):
    first, run = saved(tmp_path)
    kept = checkpoints(tmp_path)
    with (
        files_that_cannot_grow(20_000),
        pytest.raises(DirlError, match=r"step-000002.* cannot be written \(.*\): make room"),
    ):
        kept.save(2, *run, {})
    assert list(kept.directory.iterdir()) == [first]
    assert load_checkpoint(first, *start(seed=1))["step"] == 1


def test_the_thread_that_writes_a_checkpoint_ends_with_it(tmp_path):
    _, run = saved(tmp_path)
    kept = checkpoints(tmp_path, in_background=True)
    for step in (2, 3):
        kept.save(step, *run, {})
        kept.wait()
    deadline = time.monotonic() + 10
    while writing := [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]:
        assert time.monotonic() < deadline, writing
        time.sleep(0.01)
    assert sorted(path.name for path in kept.directory.iterdir()) == ["step-000002", "step-000003"]


def test_what_fails_in_the_background_is_told_at_the_next_save_or_at_the_end(tmp_path):
    _, run = saved(tmp_path)
    kept = checkpoints(tmp_path, in_background=True)
    with pytest.raises(DirlError, match=r"step-000002.* cannot be written"), kept, files_that_cannot_grow(20_000):
        kept.save(2, *run, {})
        with pytest.raises(DirlError, match=r"step-000002.* cannot be written"):
            kept.save(3, *run, {})
        kept.save(2, *run, {})
        while not kept._background_write.pending.done():
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), kept:  # what ended the run is not hidden by what its checkpoint came to
        kept.save(4, *run, {})
        raise ZeroDivisionError
    assert steps_in(tmp_path) == [1, 4]


@contextmanager
def files_that_cannot_grow(size: int) -> Iterator[None]:
    """Every write beyond `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_is_saved_in_the_type_it_was_trained_in(tmp_path):
    lm = small_lm()
    save_model(lm, torch.bfloat16, tmp_path / "model", "", Accelerator(cpu=True))
    weights = load_file(tmp_path / "model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("cuts", [[0, 6], [0, 2, 6], [0, 1, 5, 5, 6]])
def test_a_tensor_is_read_in_whatever_parts_it_was_written(tmp_path, cuts):
    whole = torch.arange(12.0).view(6, 2)
    files = []
    for i, (low, high) in enumerate(pairwise(cuts)):
        files.append(tmp_path / f"{i}.safetensors")
        parts = {"whole": Shard(whole[low:high], (low, 0), (6, 2)), f"scalar{i}": Shard(torch.tensor(i), (), ())}
        write_shards(files[-1], parts)
    found, scalar = torch.zeros(6, 2), torch.tensor(-1)
    read_shards(files, {"whole": found, "scalar0": scalar})
    assert torch.equal(found, whole) and scalar == 0


def spread(run: Run) -> Run:
    """The run with its parameters sharded among all processes."""
    model, _ = run
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, ADAMW.build(model)


def digest(run: Run) -> str:
    """A fingerprint of parameters and optimizer states, gathered where they are sharded."""
    tensors = sorted({**trainable_parameters(run[0]), **optimizer_states(*run)}.items())
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for _, one in tensors]
    return hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in whole)).hexdigest()


def in_two_processes(job: str, directory: Path) -> list[dict]:
    """What each of two processes tells of a job below."""
    told = run_together(__name__, [[job, str(directory)]] * 2, seconds=100, ACCELERATE_USE_CPU="true")
    return [json.loads(text.splitlines()[-1]) for text in told]


def test_shards_are_read_by_one_process_and_what_one_wrote_by_several(tmp_path):
    """1 → 2 sharded → 1: parameters and optimizer states stay the same to the bit."""
    run = start(optim=ADAMW)
    train(run, 2)
    kept = checkpoints(tmp_path)
    kept.save(2, *run, {})
    sharded, other = in_two_processes("reshard", tmp_path)
    assert sharded["loaded"] == other["loaded"] == digest(run)
    path, told = begin(tmp_path)
    assert path.name == "step-000003" and not told
    names = [f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)]
    assert sorted(file.name for file in path.iterdir()) == [SUMS, *names, STATE]
    in_all = sum(parameter.nbytes for parameter in trainable_parameters(run[0]).values())
    assert all((path / name).stat().st_size < 0.6 * in_all for name in names[:2])
    again = start(seed=1, optim=ADAMW)
    load_checkpoint(path, *again)
    assert digest(again) == sharded["trained"]
    assert sharded["full"] == other["full"] and "cannot be written" in sharded["full"]
    assert sharded["damaged"] == other["damaged"] == "step-000003"


def reshard(directory: Path) -> dict:
    """Go on in shards from what one process wrote, save, fill the other process's disk, find a damaged shard."""
    accelerator = Accelerator(cpu=True)
    kept = RunCheckpoints(directory / "checkpoints", accelerator, 2, in_background=True)
    run = spread(start(seed=2, optim=ADAMW))
    load_checkpoint(kept.begin("auto", print), *run)
    loaded = digest(run)
    train(run, 1)
    with kept:
        kept.save(3, *run, {})
        trained = digest(run)
    try:
        with files_that_cannot_grow(5_000 if accelerator.process_index else 10**9):
            kept.save(4, *run, {})
            kept.wait()
    except DirlError as error:
        full = str(error)
    kept.save(4, *run, {})
    kept.wait()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        flipped(directory / "checkpoints/step-000004/model-00002-of-00002.safetensors")
    accelerator.wait_for_everyone()
    path = kept.begin("auto", lambda sentence: None)
    return {"loaded": loaded, "trained": trained, "full": full, "damaged": path.name}


if __name__ == "__main__":  # one of two processes
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))), flush=True)
    torch.distributed.destroy_process_group()
