"""One DiPO update, packed against the published expansion: the same gradient, fewer forwards, less time and memory.

python -m benchmarks.dipo_step            # about two minutes on one core
python -m benchmarks.dipo_step sweep      # packed alone, by tokens a row
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dirl_cli.diffusion.states import BlockSpec
from dirl_cli.models.load import DiffusionLM, diffusion_lm
from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
from dirl_cli.rl.batch import TrajectoryGroup
from dirl_cli.training.logprobs import LogprobModel
from dirl_cli.types import Trajectory
from tests.helpers.algorithms import algorithm
from tests.helpers.whole_batch import objective_rows
from tests.reference.expanded import dipo_sum, expand, expanded_logprobs

REPOSITORY = Path(__file__).parents[1]

BLOCK, GROUP, PROMPT, BUFFER = 4, 8, 46, 98  # the prompt ends inside a block, the buffer of an answer with one
VOCABULARY, MASK = 4096, 4095
ROW_TOKENS = 576
REPEATS = 5
DIPO = algorithm("dipo")


def model() -> DiffusionLM:
    config = SDARConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    lm = diffusion_lm(SDARForCausalLM(config).eval(), None, BLOCK, MASK)
    for parameter in lm.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return lm


@dataclass(frozen=True)
class Case:
    """A group of answers to one prompt, and the most tokens that an answer may have."""

    group: TrajectoryGroup
    buffer: int

    @property
    def answer_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.group.trajectories)


def full() -> Case:
    """Every answer fills its buffer, a token a step."""
    return case([BUFFER] * GROUP, [[1, 2, 3, 4]])


def ragged() -> Case:
    """Answers of all lengths, half a buffer on average, in twelve steps for five blocks: 1.7 tokens a step."""
    lengths = [BUFFER * part // 32 // BLOCK * BLOCK + BUFFER % BLOCK for part in (4, 8, 10, 12, 16, 18, 24, 32)]
    return case(lengths, [[1, 1, 2, 3], [2, 1, 1, 1], [1, 2, 2, 1], [2, 1, 1, 2], [1, 2, 3, 1]])


def case(lengths: list[int], patterns: list[list[int]]) -> Case:
    """Answers of these lengths whose blocks were revealed after the patterns in turn."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, VOCABULARY - 1, (PROMPT,), generator=generator).tolist()
    trajectories = []
    for length in lengths:
        places = range(PROMPT, PROMPT + length)
        steps = [patterns[place // BLOCK % len(patterns)][place % BLOCK] for place in places]
        steps[: BLOCK - PROMPT % BLOCK] = [1, 2]
        token_ids = torch.randint(2, VOCABULARY - 1, (length,), generator=generator).tolist()
        trajectories.append(Trajectory(prompt, token_ids, steps, [0.0] * length, "length"))
    return Case(TrajectoryGroup(trajectories, torch.randn(GROUP, generator=generator).tolist()), max(BUFFER, *lengths))


def packed(lm: DiffusionLM, case: Case, row_tokens: int = ROW_TOKENS) -> int:
    """Accumulate the gradient a row at a time; returns token-forwards."""
    tokens, random = BlockSpec(BLOCK, MASK), torch.Generator()
    rows, lengths = objective_rows([case.group], DIPO, tokens, 0, row_tokens, True, random)
    scorer = LogprobModel(lm.model, lm.unsampled_ids).to(lm.device)
    for part in rows.to(lm.device).split(1):
        loss = DIPO.loss(part, *scorer(part)[:2])["loss"]
        (loss / DIPO.denominator(lengths, case.buffer)).backward()
    return rows.num_tokens


def expanded(lm: DiffusionLM, case: Case, all_logits: bool = False, rows_each: int = BLOCK) -> int:
    """Accumulate the gradient an answer, that is `block_size` doubled rows, at a time; returns token-forwards."""
    rows = expand(case.group.trajectories, PROMPT + case.buffer, BLOCK, MASK, 0)
    advantage = torch.tensor(case.group.advantages)
    for first in range(0, len(rows.sample), rows_each):
        part = rows.rows(slice(first, first + rows_each))
        logprobs = expanded_logprobs(lm, part, all_logits)
        loss = dipo_sum(logprobs, logprobs.detach(), advantage[part.sample], part.scored, DIPO.clip_low, DIPO.clip_high)
        (loss / case.answer_tokens).backward()
    return rows.token_ids.numel()


def published(lm: DiffusionLM, case: Case) -> int:
    """As `expanded`, with the logits of every place of the noised halves."""
    return expanded(lm, case, all_logits=True)


def row_by_row(lm: DiffusionLM, case: Case) -> int:
    """As `expanded`, a doubled row at a time."""
    return expanded(lm, case, rows_each=1)


SIDES: dict[str, Callable[[DiffusionLM, Case], int]] = {f.__name__: f for f in (published, expanded, packed)}
CASES: dict[str, Callable[[], Case]] = {f.__name__: f for f in (full, ragged)}


def gradient(lm: DiffusionLM, side: Callable[[DiffusionLM, Case], int], case: Case) -> tuple[Tensor, int]:
    lm.model.zero_grad(set_to_none=False)
    forwards = side(lm, case)
    return torch.cat([p.grad.flatten().clone() for p in lm.model.parameters() if p.grad is not None]), forwards


def interleaved(*sides: Callable[[], object]) -> list[list[float]]:
    """CPU seconds of each side, measured in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(REPEATS):
        for side, collected in zip(sides, times, strict=True):
            start = time.process_time()
            side()
            collected.append(time.process_time() - start)
    return times


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process in MiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def peak(side: str, name: str) -> None:
    """Print what one update holds at most beyond the model and its gradients, in MiB; the process does nothing else."""
    lm, update = model(), (SIDES | {"row_by_row": row_by_row})[side]
    update(lm, case([6], [[1, 2, 3, 4]]))  # libraries set themselves up at their first use
    work, before = CASES[name](), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start VmHWM anew
    update(lm, work)
    print(memory("VmHWM") - before)


def peak_of(side: str, name: str) -> float:
    """`peak` in a process of its own, whose freed memory goes back at once, so that what is held is what is used."""
    command = [sys.executable, "-m", "benchmarks.dipo_step", "peak", side, name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def compare() -> None:
    lm = model()
    config = lm.model.config
    parameters = sum(p.numel() for p in lm.model.parameters())
    print(
        f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, fp32. Model:"
        f" {config.num_hidden_layers} layers × {config.hidden_size}, vocabulary {VOCABULARY}, {parameters / 1e6:.1f} M."
        f" Group of {GROUP}, prompt {PROMPT}, answer buffer {BUFFER}, block {BLOCK}. Micro-batch: an answer"
        f" ({BLOCK} doubled rows) expanded, a row of {ROW_TOKENS} tokens packed. CPU seconds: median of {REPEATS},"
        " interleaved. MiB: peak resident memory beyond the model and its gradients, a process a side.\n"
    )
    print("| answers | against | gradient differs by | token-forwards | CPU seconds | MiB |")
    print("|---|---|--:|--:|--:|--:|")
    for name, make in CASES.items():
        work = make()
        found = {side: gradient(lm, run, work) for side, run in SIDES.items()}
        times = dict(zip(SIDES, interleaved(*(partial(run, lm, work) for run in SIDES.values())), strict=True))
        peaks = {side: peak_of(side, name) for side in SIDES}
        ours, our_forwards = found["packed"]
        for side in ("published", "expanded"):
            theirs, forwards = found[side]
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            assert difference <= 1e-5, f"{name}: the gradients of packed and {side} differ by {difference:.1e}"
            faster = statistics.median(a / b for a, b in zip(times[side], times["packed"], strict=True))
            seconds, our_seconds = statistics.median(times[side]), statistics.median(times["packed"])
            cells = [
                f"{difference:.0e}",
                f"{forwards:,} → {our_forwards:,}: {forwards / our_forwards:.1f}× fewer",
                f"{seconds:.2f} → {our_seconds:.2f}: {faster:.1f}× less",
                f"{peaks[side]:.0f} → {peaks['packed']:.0f}: {peaks[side] / peaks['packed']:.1f}× less",
            ]
            print(f"| {name} | {side} | {' | '.join(cells)} |")
    print("\nfull: a token a step. ragged: 1.7 tokens a step, half a buffer on average, padded to it where expanded.")
    print("published: logits of every place. expanded: of the scored places alone, so that only the layout differs.")
    print(
        f"A doubled row at a time, the expanded form holds {peak_of('row_by_row', 'full'):.0f} MiB:"
        " the packed form cannot cut an answer, and trades that for its fewer forwards."
    )


def sweep() -> None:
    lm = model()
    print("| tokens a row | full: token-forwards | CPU seconds | ragged: token-forwards | CPU seconds |")
    print("|--:|--:|--:|--:|--:|")
    budgets = (144, 288, 576, 1152, 2304, 4608)
    cells: dict[int, list[str]] = {budget: [] for budget in budgets}
    for make in CASES.values():
        work = make()
        sides = [partial(packed, lm, work, budget) for budget in budgets]
        for budget, side, times in zip(budgets, sides, interleaved(*sides), strict=True):
            cells[budget] += [f"{side():,}", f"{statistics.median(times):.2f}"]
    for budget in budgets:
        print(f"| {budget} | {' | '.join(cells[budget])} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    action, *arguments = sys.argv[1:] or ["compare"]
    {"compare": compare, "sweep": sweep, "peak": peak}[action](*arguments)
