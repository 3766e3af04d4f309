"""Checkpoints: what goes in comes out bit for bit, and damage is told, not loaded."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from small import small_lm
from torch import nn

from dirl_cli.disk import whole_directory
from dirl_cli.errors import DirlError
from dirl_cli.training.checkpoint import MODEL, OPTIMIZER, STATE, Checkpoints, find, load, save_model
from dirl_cli.training.optim import Muon

Run = tuple[nn.Module, list[torch.optim.Optimizer]]


def start(seed: int = 0) -> Run:
    """A fresh tied model and its two optimizers."""
    model = small_lm(seed=seed, scale=1.0).model
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model, Muon(0.02, 0.95, 4e-3, (0.9, 0.98), 1e-8, 0.01).build(model)


def train(run: Run, steps: int) -> None:
    model, optimizers = run
    for step in range(steps):
        ids = torch.arange(8)[None] + step
        model(ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def checkpoints(directory: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(directory / "checkpoints", keep, Accelerator(cpu=True))


def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_never_stopped(tmp_path):
    through = start()
    train(through, 2)
    path = checkpoints(tmp_path).save(2, *through)
    train(through, 2)
    resumed = start(seed=1)
    assert load(path, *resumed)["step"] == 2
    train(resumed, 2)
    for one, other in zip(through[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_saving_changes_nothing_in_the_run_that_saves(tmp_path):
    saving, other = start(), start()
    for run in (saving, other):
        train(run, 1)
    checkpoints(tmp_path).save(1, *saving)
    for run in (saving, other):
        train(run, 2)
    for one, two in zip(saving[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_tied_parameter_is_written_once_and_its_optimizer_state_by_name(tmp_path):
    run = start()
    train(run, 1)
    path = checkpoints(tmp_path).save(1, *run)
    assert "lm_head.weight" not in load_file(path / MODEL)
    states = load_file(path / OPTIMIZER)
    assert "model.layers.0.mlp.up_proj.weight.momentum_buffer" in states
    assert states["model.embed_tokens.weight.exp_avg"].shape == (50, 32)


def test_the_oldest_go_and_the_latest_is_found(tmp_path):
    run = start()
    train(run, 1)
    kept = checkpoints(tmp_path)
    assert kept.latest() is None
    for step in (5, 10, 1_000_000):
        kept.save(step, *run)
    assert sorted(path.name for path in kept.directory.iterdir()) == ["step-000010", "step-1000000"]
    assert kept.latest() == kept.directory / "step-1000000"


def test_what_a_crash_left_half_written_is_not_a_checkpoint(tmp_path):
    run = start()
    train(run, 1)
    kept = checkpoints(tmp_path)
    whole = kept.save(5, *run)
    with pytest.raises(KeyboardInterrupt), whole_directory(kept.directory / "step-000010") as partial:
        (partial / MODEL).write_bytes(b"half")
        assert kept.latest() == whole
        raise KeyboardInterrupt
    (kept.directory / ".step-000015.partial").mkdir()
    (kept.directory / "step-000020").mkdir()
    assert kept.latest() == whole


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path, name):
    run = start()
    train(run, 1)
    path = checkpoints(tmp_path).save(1, *run)
    file = path / name
    content = file.read_bytes()
    tensors = safetensors.torch.load(content)
    remedy = f"remove {path} to go on from the checkpoint before it"

    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DirlError, match=f"{name} is damaged .*{remedy}"):
        load(path, *run)

    gone = next(key for key in tensors if key.startswith("model.layers.1"))
    save_file({key: value for key, value in tensors.items() if key != gone}, file)
    with pytest.raises(DirlError, match=f"{name} lacks the tensor {gone}: {remedy}"):
        load(path, *run)

    save_file({**tensors, gone: torch.zeros(3)}, file)
    with pytest.raises(DirlError, match=rf"{name} holds {gone} with shape \(3,\), not "):
        load(path, *run)

    file.unlink()
    with pytest.raises(DirlError, match=f"{name} is missing: {remedy}"):
        load(path, *run)


def test_resume_takes_a_checkpoint_or_the_directory_of_a_run(tmp_path):
    run = start()
    train(run, 1)
    path = checkpoints(tmp_path).save(7, *run)
    assert find(str(path)) == find(str(tmp_path)) == path
    assert find("auto") is None and find("never") is None
    with pytest.raises(DirlError, match="holds no checkpoint"):
        find(str(tmp_path / "elsewhere"))


def test_a_checkpoint_is_read_without_running_code_from_it(tmp_path):
    run = start()
    train(run, 1)
    path = checkpoints(tmp_path).save(1, *run)
    assert sorted(file.name for file in path.iterdir()) == [MODEL, OPTIMIZER, STATE]
    assert json.loads((path / STATE).read_text()) == {"step": 1}


def test_a_full_disk_is_told_in_a_sentence_and_costs_no_earlier_checkpoint(tmp_path):
    run = start()
    train(run, 1)
    kept = checkpoints(tmp_path)
    first = kept.save(1, *run)
    with (
        files_that_cannot_grow(20_000),
        pytest.raises(DirlError, match=r"step-000002 cannot be written \(.*\): make room"),
    ):
        kept.save(2, *run)
    assert list(kept.directory.iterdir()) == [first]
    assert load(first, *start(seed=1))["step"] == 1


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
    save_model(lm, "bfloat16", tmp_path / "model", "", Accelerator(cpu=True))
    weights = load_file(tmp_path / "model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == "bfloat16"
