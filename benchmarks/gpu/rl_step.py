"""One whole step of `dirl rl` at the shape of 1.7B, phase by phase, as the command itself logs it.

python benchmarks/gpu/rl_step.py TOKENIZER_DIRECTORY [toy|1.7B] [native|lmdeploy]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import machine, random_model, saved


def main(tokenizer: str, shape: str = "1.7B", engine: str = "native") -> None:
    directory = Path(tempfile.mkdtemp())
    lm = random_model(shape, "sdpa")
    model = saved(lm, directory / "model", tokenizer)
    del lm
    words = [f"model={model}", f"rollout={engine}", "steps=3", f"out={directory / 'run'}"]
    words += ["rl.problems=16", "rl.group_size=8", "rl.filter=none", "decoding.max_new_tokens=256", "eval_problems=0"]
    words += [
        "rl.mini_batches=1",
        "optim=adamw_rl",
        "optim.lr=1e-6",
        "row_tokens=16384",
        "gradient_checkpointing=true",
        "show_every=0",
    ]
    subprocess.run([sys.executable, "-c", "from dirl_cli.cli import app; app()", "rl", *words], check=True)
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    phases = {name: seconds for name, seconds in lines[-1].items() if name.startswith("seconds/")}
    print(f"{machine()}, {shape}, rollout={engine}, 128 answers of 256 tokens")
    print("\n| phase | seconds |\n|---|--:|")
    for name, seconds in phases.items():
        print(f"| {name.removeprefix('seconds/')} | {seconds:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
