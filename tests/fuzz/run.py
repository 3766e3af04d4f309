"""Feed mutated files, overrides, numbers, answers and checkpoints to what reads them, and keep what breaks it.

python -m tests.fuzz --minutes 60 --findings DIR [--seed 0] [--only rows,answers]

Whatever is read may be refused with a DirlError. Another exception, a process that dies and an input that takes more
than 30 s of its process are findings: the input and what happened are kept in --findings, one of a kind. Changes are
drawn from the seed; an input that is refused with a new sentence is changed further. Every target gets the same time,
whatever it breaks; counts.md in --findings tells how many inputs each had.
"""

import argparse
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from tests.helpers.asked import asked
from tests.helpers.paths import SHARED

os.environ.setdefault("OMP_NUM_THREADS", "1")
TOO_LONG = 30.0  # seconds of processor time for one input
STUCK = 600.0  # seconds after which it is held to wait for something that does not come
ROUND = 120.0  # seconds in one process
MEMORY = 12 * 2**30  # bytes of address space of that process
DEEP = "[" * 3000 + "]" * 3000
ODD: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, -(10**30), 0.5, 1e308, float("nan"), float("inf")]
ODD += [
    "",
    " ",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "é" * 300,
    "../../x",
    "/etc/passwd",
    "${oc.env:HOME}",
    "{{ 1/0 }}",
    "???",
]
ODD += ["x" * 5000, [], {}, [[]], [None], {"": None}, [1, "a"], {"role": "assistant", "content": "x"}]
TOKENS = [
    b"\x00",
    b"\xff",
    b"\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
]
TOKENS += [
    b"${",
    b"=",
    b"'",
    b"../",
    b"\\boxed{",
    b"\\frac{",
    b"^{",
    b"!",
    b"\xe2\x88\x9e",
    b"\\sqrt",
    b"\\text{",
    b"(" * 50,
]

Target = Callable[[bytes, Path], None]


def mutated(corpus: list[bytes], random: random.Random) -> bytes:
    """One of the corpus, changed in a few places: a value of its JSON, or bytes."""
    data = random.choice(corpus)
    if random.random() < 0.6 and (changed := with_odd_value(data, random)) is not None:
        data = changed
        if random.random() < 0.7:
            return data
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        data = with_odd_bytes(data, random, corpus)
    return data


def with_odd_value(data: bytes, random: random.Random) -> bytes | None:
    """A JSON text or JSON lines with one value, somewhere in it, replaced, repeated or left out."""
    lines = data.split(b"\n") if b"\n{" in data else [data]
    i = random.choice([i for i, line in enumerate(lines) if line] or [0])
    try:
        whole = [json.loads(lines[i])]
    except (ValueError, RecursionError):
        return None
    places = list(containers(whole))
    place, key = random.choice(places)
    match random.randrange(4):
        case 0 if place is not whole:
            del place[key]
        case 1 if isinstance(place, list):
            place.append(place[key])
        case 2:
            place[key] = random.choice([near(place[key], random), place[random.choice(list(keys(place)))]])
        case _:
            place[key] = random.choice(ODD)
    text = json.dumps(whole[0]) if whole else ""
    lines[i] = (text if random.random() < 0.95 else DEEP).encode(errors="surrogatepass")
    return b"\n".join(lines)


def near(value: Any, random: random.Random) -> Any:
    """A value that may pass where the value does."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return value + random.choice((-1, 1)) if isinstance(value, int) else value * random.choice((-1.0, 0.0, 0.5, 1e3))


def containers(node: Any, depth: int = 0) -> Any:
    """Every list and object in a value, with each of its keys."""
    for key in keys(node):
        yield node, key
        if isinstance(node[key], dict | list) and depth < 20:
            yield from containers(node[key], depth + 1)


def keys(node: Any) -> Any:
    return list(node) if isinstance(node, dict) else range(len(node))


def with_odd_bytes(data: bytes, random: random.Random, corpus: list[bytes]) -> bytes:
    a, b = sorted(random.randrange(len(data) + 1) for _ in range(2))
    match random.randrange(6):
        case 0 if data:
            flipped = bytearray(data)
            flipped[min(a, len(data) - 1)] ^= 1 << random.randrange(8)
            return bytes(flipped)
        case 1:
            return data[:a] + random.choice(TOKENS) + data[a:]
        case 2:
            return data[:a] + data[min(b, a + 8) :]
        case 3:
            return data[:b] + data[a:b][:1000] * random.choice((1, 3, 30)) + data[b:]
        case 4:
            other = random.choice(corpus)
            start = random.randrange(len(other) + 1)
            return data[:a] + other[start : start + random.randrange(1, 200)] + data[b:]
        case _:
            return data[:a] + random.randbytes(random.choice((1, 4))) + data[a:]


# What is fed. Each returns a small corpus and a function of (input, empty directory); `home` is its own meanwhile.


def rows(home: Path) -> tuple[list[bytes], Target]:
    """Data files, as demonstrations, as problems and as predictions of a benchmark."""
    from dirl_cli.data.columns import rename_columns
    from dirl_cli.data.demonstration_rows import demonstration
    from dirl_cli.data.problem_rows import problem
    from dirl_cli.data.rows import read_rows
    from dirl_cli.errors import DirlError
    from dirl_cli.evaluation.predictions import read_predictions
    from dirl_cli.types import Problem

    def run(data: bytes, here: Path) -> None:
        file = here / ("a.json", "a.jsonl", "a.jsonl.gz", "a.gz", "a.csv")[len(data) % 5]
        file.write_bytes(gzip.compress(data, 1) if file.suffix == ".gz" else data)
        found = rename_columns(read_rows(file), {"question": "problem", "content": "value", "role": "from"})
        for read in (demonstration, lambda row: problem(row, "0")):
            for row in found:
                with suppress(DirlError):
                    read(row)
        read_predictions(((row.location, row.fields) for row in found), [Problem("0", "1+1", "2")])

    lines = [
        {"prompt": "<|im_start|>user\nWhat?", "response": "4<|im_end|>"},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"problem": "1 + 1", "ground_truth_answer": 2, "id": "a", "subset": None},
        {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be."},
        {"question": "1 + 1", "answer": "1+1=2\n#### 2"},
        {"prompt": [{"role": "user", "content": "1 + 1"}], "reward_model": {"ground_truth": '["2"]'}},
        {
            "messages": [
                {"role": "User", "content": [{"type": "text", "text": "Why?"}]},
                {"role": "model", "content": ""},
            ]
        },
        {"question": "a", "ground_truth_answer": 1.50e-7},
        {"index": 0, "completion": "\\boxed{2}"},
    ]
    texts = [json.dumps(lines), "\n".join(map(json.dumps, lines)), json.dumps(lines, indent=1)]
    texts += [json.dumps(lines[0], indent=1), 'question,ground_truth_answer\n"1, 2\n?",3\n,\n']
    return [text.encode() for text in texts], run


def parquet(home: Path) -> tuple[list[bytes], Target]:
    """Parquet files."""
    import pyarrow as pa
    import pyarrow.parquet

    from dirl_cli.data.problem_rows import problem
    from dirl_cli.data.rows import read_rows

    def run(data: bytes, here: Path) -> None:
        (here / "a.parquet").write_bytes(data)
        for row in read_rows(here / "a.parquet"):
            problem(row, "0")

    corpus = []
    for columns in ({"question": ["1+1", "2"], "ground_truth_answer": [2, 3]}, {"messages": [[{"role": "user"}], []]}):
        for compression in ("none", "snappy", "zstd"):
            sink = io.BytesIO()
            pyarrow.parquet.write_table(pa.table(columns), sink, compression=compression)
            corpus.append(sink.getvalue())
    return corpus, run


def rollouts(home: Path) -> tuple[list[bytes], Target]:
    """Rollout files."""
    from dirl_cli.rollout.storage import Record, read_rollout, to_json
    from dirl_cli.types import Problem, Trajectory

    def run(data: bytes, here: Path) -> None:
        (here / "step-000001.jsonl").write_bytes(data)
        read_rollout(here / "step-000001.jsonl")

    answer = Trajectory([1, 2], [3, 4, 5, 6], [1, 1, 2, 2], [-0.1, -0.2, -0.3, -0.4], "stop", 2, 2, 0, (6,))
    record = Record(Problem("a", "1+1", "2"), 0, "2", answer, 1.0, {"accuracy": 1.0}, True, 0.5, True)
    return [(json.dumps(to_json(record)) + "\n").encode() * n for n in (1, 3)], run


def replays(home: Path) -> tuple[list[bytes], Target]:
    """Rollout files, as far as the optimizer step that learns from them."""
    import torch

    from dirl_cli.models.load import diffusion_lm
    from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
    from dirl_cli.rl.corrections import Correction
    from dirl_cli.rl.groups import add_advantages
    from dirl_cli.rl.replay import ReplayedRollouts, rollouts_of
    from dirl_cli.rl.rollout_metrics import rollout_metrics
    from dirl_cli.rl.update import PolicyUpdate
    from dirl_cli.rollout.native import NativeSampler
    from dirl_cli.rollout.storage import Record, rollout_path, to_json
    from dirl_cli.training.logprobs import LogprobModel
    from dirl_cli.training.parallel import start_accelerator
    from dirl_cli.training.trainer import Trainer
    from dirl_cli.types import Decoding, Problem
    from tests.helpers.algorithms import ALGORITHMS, algorithm

    config = SDARConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    lm = diffusion_lm(SDARForCausalLM(config), None, 4, 49)
    begun = {name: value.clone() for name, value in lm.model.state_dict().items()}
    objectives = [algorithm(name) for name in ALGORITHMS]
    optimizer = torch.optim.SGD(lm.model.parameters(), lr=1e-3)
    accelerator = start_accelerator("cpu", "float32")
    trainer = Trainer(accelerator, LogprobModel(lm.model, lm.unsampled_ids), [optimizer], lambda step: 1.0, 1.0)

    def run(data: bytes, here: Path) -> None:
        rollout_path(here, 1).write_bytes(data)
        lm.model.load_state_dict(begun)
        trainer.skipped = 0
        objective = objectives[len(data) % len(objectives)]
        rollout = ReplayedRollouts(rollouts_of(here, 1), lm).collect(0)
        groups = add_advantages(rollout.groups, objective.estimator({}))
        rollout_metrics(rollout, 0)
        update = PolicyUpdate(
            trainer,
            objective,
            objective.estimator({}),
            lm,
            reference=LogprobModel(lm.model, lm.unsampled_ids) if objective.beta else None,
            old_from_sampler=objective.is_exact,
            correction=Correction(cap=0.0),
            mini_batches=1,
            epochs=1,
            train_tail=len(data) % 2 == 0,
            row_tokens=256,
            micro_rows=None,
            longest=8,
            seed=0,
        )
        if groups:
            update.run(groups, 0)
        assert all(value.isfinite().all() for value in lm.model.state_dict().values()), "it learned what is no number"

    asked = Decoding(temperature=1.0, max_new_tokens=8, stop_token_ids=(1, 2, 3))
    found = NativeSampler(lm).sample([[5, 6, 7], [8, 9, 10, 11]], 3, asked)
    lines = []
    for i, group in enumerate(found):
        for k, one in enumerate(group):
            reward = float(k % 2)
            record = Record(Problem(str(i), "?", "!"), k, "", one, reward, {"accuracy": reward}, learned_from=True)
            lines.append(json.dumps(to_json(record)))
    return ["".join(f"{line}\n" for line in lines[:n]).encode() for n in (2, 6)], run


def evaluations(home: Path) -> tuple[list[bytes], Target]:
    """The card, the answers and the digests of an evaluation."""
    from dataclasses import asdict

    from dirl_cli.evaluation.answers import GradedAnswer
    from dirl_cli.evaluation.compare import common_problems, compare, differing_settings
    from dirl_cli.evaluation.metrics import measure
    from dirl_cli.evaluation.result_card import ANSWERS, CARD, SOURCE, read_evaluation

    answers = [GradedAnswer(str(i), k, "4", i > k, "stop", 3, 4, 2, 2, 0.1) for i in range(3) for k in range(2)]
    metrics = asdict(measure(answers))
    card = {"model": {"name": "tiny"}, "bench": {"name": "b", "limit": None}, "metrics": metrics, "samples": 2}
    files = {
        CARD: json.dumps(card),
        ANSWERS: "".join(json.dumps(asdict(answer)) + "\n" for answer in answers),
        SOURCE: json.dumps({"problems": {str(i): "digest" for i in range(3)}}),
    }

    def run(data: bytes, here: Path) -> None:
        for directory in ("good", "odd"):
            (here / directory).mkdir()
            for name, text in files.items():
                (here / directory / name).write_text(text)
        kind, _, content = data.partition(b"\n")
        (here / "odd" / list(files)[kind[0] % 3 if kind else 0]).write_bytes(content)
        good, odd = (read_evaluation(here / name) for name in ("good", "odd"))
        odd.of  # noqa: B018
        list(compare(good, odd, common_problems(good, odd)))
        differing_settings(good, odd)

    order = sorted(range(3), key=lambda i: i)
    return [b"%c\n" % (48 + i) + text.encode() for i, text in zip(order, files.values(), strict=True)], run


def overrides(home: Path) -> tuple[list[bytes], Target]:
    """Words of a command line."""
    from dirl_cli.cli.launch import launch

    def run(data: bytes, here: Path) -> None:
        words = data.decode(errors="replace").replace("\x00", "").split("\n")
        name = ("sft", "rl", "eval", "generate")[len(data) % 4]
        with redirect_stdout(io.StringIO()):
            launch(name, ["--cfg", "job"], [word for word in words if not word.startswith("-")], None)

    words = ["model=tiny", "data=a.jsonl", "optim.lr=1e-6,2e-6", "bench=all", "algo=dipo", "seed=0", "out=/tmp/x"]
    words += ["+reward.weights={a.py\\:b: 0.2}", "data.columns={question: problem}", "decoding.stop_token_ids=[1,2]"]
    words += [
        "prompt='What is 7 times 8?'",
        "compare=[a/b,c/d]",
        "~logger",
        "masking=choice(band,cosine)",
        "name=${seed}",
    ]
    return [word.encode() for word in words] + [
        b"\n".join(word.encode() for word in words[i::3]) for i in range(3)
    ], run


def numbers(home: Path) -> tuple[list[bytes], Target]:
    """Values of the keys that take a number; what is accepted goes on to a dry run, or to being built."""
    from hydra import compose, initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    from dirl_cli.cli import config_tree
    from dirl_cli.cli.build import build
    from dirl_cli.cli.launch import launch
    from dirl_cli.commands import eval as evaluation
    from dirl_cli.commands import generate
    from dirl_cli.files import conf_dir
    from dirl_cli.types import Decoding

    def look(cfg: DictConfig, *_: Any) -> None:
        for value in cfg.values():
            if isinstance(value, DictConfig) and "_target_" in value:
                build(value)
        build(cfg.decoding, Decoding)

    evaluation.run = generate.run = look  # which have no dry run
    few = ["data.train=20", "data.held_out=2", "data.test=2"]
    small = [*few, "dry_run=true", "row_tokens=256", "decoding.max_new_tokens=16"]
    commands = {
        "sft": [*small, "batch_size=4"],
        "rl": [*small, "rl.problems=2", "rl.group_size=2", "decoding=dynamic"],
        "eval": ["bench=arithmetic"],
        "generate": ["prompt=x"],
    }

    def run(data: bytes, here: Path) -> None:
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            return
        given = given if isinstance(given, dict) else {}
        command = next((key.partition(" ")[0] for key in given if key.partition(" ")[0] in commands), "sft")
        words = [
            f"{key.partition(' ')[2]}={spelled(value)}"
            for key, value in given.items()
            if key.partition(" ")[0] == command
        ]
        writes = [] if command == "generate" else [f"out={here}/run"]
        with redirect_stdout(io.StringIO()):
            launch(command, [], ["model=tiny", *commands[command], *writes, *words], None)

    corpus: list[dict[str, Any]] = []
    config_tree.prepare(None)
    for command in commands:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = OmegaConf.to_container(compose(command, ["model=tiny", *commands[command]]))
        leaves = [(f"{command} {key}", value) for key, value in config_tree.leaves(cfg) if type(value) in (int, float)]
        corpus += [{key: odd} for key, _ in leaves for odd in (-1, 0, 2**31, 1e308, math.nan, math.inf, "x", None)]
        corpus += [dict(pair) for pair in pairwise(leaves)]
    return [json.dumps(given).encode() for given in corpus], run


def spelled(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {spelled(one)}" for key, one in value.items()) + "}"
    return "null" if value is None else str(value).lower()


def configs(home: Path) -> tuple[list[bytes], Target]:
    """A user's YAML in the place of a group's choice, composed and built."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from dirl_cli.cli import config_tree
    from dirl_cli.cli.build import build
    from dirl_cli.cli.explain import COMPLAINTS, explain
    from dirl_cli.errors import DirlError
    from dirl_cli.files import conf_dir
    from dirl_cli.types import Decoding

    kinds = {"decoding": Decoding, "masking": None, "reward": None, "optim": None, "data": None, "schedule": None}

    def run(data: bytes, here: Path) -> None:
        kind, _, content = data.partition(b"\n")
        group = list(kinds)[kind[0] % len(kinds) if kind else 0]
        command = "rl" if group == "reward" else "sft"
        (here / group).mkdir()
        (here / group / "odd.yaml").write_bytes(content)
        config_tree.prepare(here)
        words = [f"{group}=odd"]
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                cfg = compose(command, words)
            OmegaConf.resolve(cfg)
            build(cfg[group], *filter(None, [kinds[group]]))
        except COMPLAINTS as error:
            raise DirlError(explain(error, command, words)) from error

    corpus = []
    for i, group in enumerate(kinds):
        for file in sorted((conf_dir() / group).glob("*.yaml"))[:4]:
            corpus.append(b"%c\n" % (48 + i) + file.read_bytes())
    return corpus, run


def answers(home: Path) -> tuple[list[bytes], Target]:
    """Answers to be graded against reference answers, both odd: a line of reference, and the answer."""
    from dirl_cli.reward.grading import Grader

    golds = ["5", r"\frac{1}{2}", r"x^2+1", "(1, 2)", r"\{1,2\}", "3:4", r"12\%", r"\text{east}", r"1 \pm \sqrt{2}"]
    golds += [
        r"[0,\infty)",
        "x=5",
        "52_8",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        r"x \approx 3.14",
        "1,000",
        "$5",
        "10^{-3}",
    ]
    grader = Grader(1, 2.0)

    def run(data: bytes, here: Path) -> None:
        gold, _, answer = data.decode(errors="replace").partition("\n")
        boxed = [rf"It is \boxed{{{text}}}." for text in (answer, gold)]
        whole = [(0, asked(gold), answer), (1, asked(gold), boxed[0]), (2, asked(answer), boxed[1])]
        found = dict(grader.grade(whole))
        assert {found[key] for key, *_ in whole} <= {0.0, 1.0}

    more = [
        r"9^{9^{9^9}}",
        "10000!",
        r"\sqrt[3]{x}",
        r"\int_0^1 x dx",
        r"\sum_{i=1}^{10^9} i",
        "__import__('os')",
        r"\lim_{x\to 0}",
    ]
    pairs = list(zip([*golds, *more], [*more, *golds], strict=True))
    pairs += [(gold, gold) for gold in golds]
    judged = SHARED / "cases/grading.jsonl"  # where it is, answers that were judged by hand
    rows = map(json.loads, judged.read_text().splitlines()) if judged.exists() else ()
    pairs += [(str(row["gold"]), row["completion"]) for row in rows]
    return [f"{gold}\n{answer}".encode() for gold, answer in pairs], run


def conversations(home: Path) -> tuple[list[bytes], Target]:
    """Messages, questions and chat templates, on their way to tokens."""
    from dirl_cli.data.chat import encode_demonstrations, encode_messages, encode_prompt
    from dirl_cli.data.demonstration_rows import demonstration
    from dirl_cli.data.rows import read_rows
    from dirl_cli.models.tiny import CHATML, train_tokenizer
    from dirl_cli.types import Instruction

    tokenizer = train_tokenizer(["What is 7 times 8?", "It is 56."])

    def run(data: bytes, here: Path) -> None:
        kind, _, content = data.partition(b"\n")
        tokenizer.chat_template = content.decode(errors="replace") if kind[:1] == b"t" else CHATML
        lines = plain if kind[:1] == b"t" else content
        (here / "a.jsonl").write_bytes(lines)
        for row in [demonstration(row) for row in read_rows(here / "a.jsonl")]:
            encode_demonstrations(tokenizer, [row], Instruction("Think.", "system", True))
            encode_prompt(tokenizer, row.fields.get("prompt", "x"))
            if "messages" in row.fields:
                encode_messages(tokenizer, row.fields["messages"])

    said = {"role": "assistant", "content": "\ue0001\ue001 <think>", "reasoning_content": "Hm."}
    asked = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Why? <|im_end|>"}]
    rows = [
        {"messages": [*asked, said]},
        {"prompt": "<|im_start|>", "response": "x<|endoftext|>"},
        {"question": "1+1", "response": "<think>2"},
    ]
    plain = "\n".join(map(json.dumps, rows)).encode()
    return [
        b"m\n" + plain,
        b"t\n" + CHATML.encode(),
        b"t\n{% for m in messages %}{{ m.content|upper }}{% endfor %}",
    ], run


def checkpoints(home: Path) -> tuple[list[bytes], Target]:
    """The files of a model, one of them odd."""
    import torch
    from transformers import logging as transformers_logging

    from dirl_cli.models.load import SavedModel, diffusion_lm
    from dirl_cli.models.sdar import SDARConfig, SDARForCausalLM
    from dirl_cli.models.tiny import train_tokenizer

    tokenizer = train_tokenizer(["What is 7 times 8?", "It is 56."])
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    config = SDARConfig(vocab_size=len(tokenizer), intermediate_size=8, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    good = home / "good"
    diffusion_lm(SDARForCausalLM(config), tokenizer, 4, 3).save(good)
    weights = dict.fromkeys(SDARForCausalLM(config).state_dict(), "model.safetensors")
    (good / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    transformers_logging.set_verbosity_error()
    files = sorted(path.name for path in good.iterdir())

    def run(data: bytes, here: Path) -> None:
        kind, _, content = data.partition(b"\n")
        name = files[kind[0] % len(files) if kind else 0]
        shutil.copytree(good, here / "model")
        (here / "model" / name).write_bytes(content)
        if name == "model.safetensors.index.json":
            (here / "model/model.safetensors").rename(here / "model/model-1.safetensors")
        device = "meta" if len(data) % 3 == 0 else "cpu"
        lm = SavedModel("odd", str(here / "model")).load("float32", device, "sdpa")
        if lm.tokenizer:
            lm.tokenizer.decode(lm.tokenizer("What is 7?")["input_ids"])

    corpus = []
    for name in files:
        text = (good / name).read_bytes().replace(b'"model.safetensors"', b'"model-1.safetensors"')
        corpus.append(b"%c\n" % next(c for c in range(32, 127) if files[c % len(files)] == name) + text)
    return corpus, run


TARGETS = {
    f.__name__: f
    for f in (
        rows,
        parquet,
        rollouts,
        replays,
        evaluations,
        overrides,
        numbers,
        configs,
        answers,
        conversations,
        checkpoints,
    )
}


def feed(name: str, seed: int, first: int, seconds: float, here: str, state: Any, kinds: Any) -> None:
    """One process of a target: inputs number `first` and on, for so many seconds after it has its corpus.

    state: the number of the input and when it began, by the clock of the process and by that on the wall; then how many
    were refused so far.
    """
    from dirl_cli.errors import DirlError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    given, run = TARGETS[name](Path(here))
    corpus = list(given)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
    seen: set[str] = set()
    number, until = first, time.time() + seconds
    while time.time() < until:
        dice = random.Random(f"{seed} {name} {number}")
        data = mutated(given if dice.random() < 0.5 else corpus, dice)  # most of what is kept was refused
        Path(here, "input").write_bytes(data)
        state[:3] = [number, time.process_time(), time.time()]
        directory = Path(here, "files")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        try:
            run(data, directory)
            outcome = "fine"
        except DirlError as error:
            outcome = str(error)
            state[3] += 1
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "dirl_cli" in frame.filename]
            where = " ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in [*ours[-1:], *frames[-1:]])
            kind = f"{type(error).__name__} at {where}"
            if kind not in seen:
                kinds.put((kind, data, "".join(traceback.format_exception(error))[-6000:]))
                seen.add(kind)
            outcome = kind
        outcome = re.sub(r"[\d'\"]+", "", outcome.replace(str(directory), ""))[:80]
        if outcome not in seen and len(seen) < 200 and len(data) < 20_000:
            seen.add(outcome)
            corpus.append(data)
        number += 1
    state[:3] = [number, 0.0, 0.0]


def is_stuck(pid: int, worked: float, began: float) -> bool:
    """Whether a process is too long at an input that it began at these times."""
    try:
        spent = sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.NoSuchProcess:
        return False
    return spent - worked > TOO_LONG or time.time() - began > STUCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--findings", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(TARGETS))
    asked = parser.parse_args()
    asked.findings.mkdir(parents=True, exist_ok=True)
    names, found = asked.only.split(","), set[tuple[str, str]]()
    if strange := [name for name in names if name not in TARGETS]:
        parser.error(f"no target is called {strange[0]}: choose among {', '.join(TARGETS)}")
    tallies = {name: Tally() for name in names}
    end, context = time.time() + 60 * asked.minutes, multiprocessing.get_context("spawn")

    def keep(name: str, kind: str, data: bytes, told: str) -> None:
        if (name, kind) not in found:
            found.add((name, kind))
            file = asked.findings / re.sub(r"\W+", "-", f"{name}-{kind}")[:120]
            file.with_suffix(".input").write_bytes(data)
            file.with_suffix(".txt").write_text(f"{name}: {kind}\n{told}")
            print(f"{name}: {kind}", flush=True)

    share = min(ROUND, 60 * asked.minutes / len(names))
    while time.time() < end - 1:
        name = min(names, key=lambda name: tallies[name].seconds)
        tally, began = tallies[name], time.time()
        with TemporaryDirectory() as here:
            state, kinds = context.Array("d", [tally.inputs, 0.0, 0.0, tally.refused]), context.Queue()
            seconds = min(share, end - began)
            process = context.Process(target=feed, args=(name, asked.seed, tally.inputs, seconds, here, state, kinds))
            process.start()
            while process.is_alive():
                process.join(1)
                while not kinds.empty():
                    keep(name, *kinds.get())
                if state[2] and process.is_alive() and is_stuck(process.pid, *state[1:3]):
                    process.kill()
                    process.join()
                    keep(name, f"hang {state[0]:.0f}", Path(here, "input").read_bytes(), "it does not come to an end")
            if process.exitcode not in (0, -signal.SIGKILL):
                data = Path(here, "input")
                keep(name, f"died {process.exitcode}", data.read_bytes() if data.exists() else b"", "the process ended")
            while not kinds.empty():
                keep(name, *kinds.get())
            finished = state[2] == 0  # else it ended in the midst of an input, which the next process leaves out
            tally.inputs, tally.refused = int(state[0]) + (not finished), int(state[3])
        tally.seconds += time.time() - began
        tally.findings = len([one for one, _ in found if one == name])
        (asked.findings / "counts.md").write_text(table(tallies))
        print(f"{name}: {tally.inputs:,} inputs", flush=True)
    print(table(tallies))
    print(f"{sum(tally.inputs for tally in tallies.values()):,} inputs, {len(found)} kinds of finding")
    sys.exit(bool(found))


@dataclass
class Tally:
    """What became of the inputs of a target."""

    inputs: int = 0
    refused: int = 0
    findings: int = 0
    seconds: float = 0.0


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| target | inputs | refused | kinds of finding | seconds |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {name} | {one.inputs:,} | {one.refused:,} | {one.findings} | {one.seconds:.0f} |"
        for name, one in tallies.items()
    ]
    return "\n".join(lines) + "\n"
