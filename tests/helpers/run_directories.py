"""Run directories that are made up, as a command leaves them."""

import json
from pathlib import Path

RL = {
    "seed": 0,
    "steps": 4,
    "out": "runs/rl/a",
    "model": {"path": "runs/sft/b/model"},
    "algo": {"name": "dipo"},
    "rl": {"problems": 16},
}
EVAL = {"bench": {"name": "sudoku"}, "samples": 2, "model": {"path": "m"}}
STEP = {"reward": 0.5, "greedy_accuracy": 0.25, "loss": 1e-9, "seconds/rollout": 2.0, "seconds/backpropagation": 1.0}


def make_run(directory: Path, steps=4, saved=4, settings=RL, metrics=STEP, finished=True) -> Path:
    """A run with a line of metrics a step, ten seconds apart, and a checkpoint; finished where it left a model."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (directory / "environment.json").write_text(
        json.dumps({"command": "/bin/python /bin/dirl rl steps=4 'name=a b'", "packages": {"torch": "2.13.0"}})
    )
    (directory / "lock").touch()
    lines = [{"step": step, "time": 1000.0 + 10 * step, **metrics} for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved:
        checkpoint = directory / "checkpoints" / f"step-{saved:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "SHA256SUMS").touch()
        (checkpoint / "state.json").write_text(json.dumps({"step": saved, "measured": {"greedy_accuracy": 0.25}}))
    if finished:
        (directory / "model").mkdir()
    return directory


def make_evaluation(directory: Path, answers=4, finished=True) -> Path:
    """An evaluation of two problems with two answers each."""
    make_run(directory, steps=0, saved=0, settings=EVAL, finished=False)
    (directory / "metrics.jsonl").unlink()
    answer = {"problem": "p", "question": "2+2?", "reference": "4", "text": "It is 4", "correct": True, "length": 3}
    (directory / "answers.jsonl").write_text((json.dumps(answer) + "\n") * answers)
    (directory / "sampled_from.json").write_text(json.dumps({"problems": {"p": "d1", "q": "d2"}}))
    if finished:
        metrics = {"accuracy": 0.75, "length": 3.0, "tokens_per_forward": 2.5, "pass_at": {}, "majority": None}
        (directory / "eval_card.json").write_text(json.dumps({"metrics": metrics}))
    return directory
