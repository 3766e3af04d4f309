"""A server under load: many clients, every answer held to the sampler's own, and what it took.

    python -m benchmarks.serve_load --clients 16 --minutes 1

It starts a server on the embedded model in a process of its own, or asks one that runs (--url and --key, of the same
model and settings). Half of the clients stream. Prints tokens a second, the ratio to the engine's own batch on as many
threads and on all cores, the milliseconds of answers at the median and the 99th percentile, and the growth of the
server's memory after its first tenth; ends with an error where an answer is not the expected one.
"""

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil
import torch

from dirl_cli import load_sampler
from dirl_cli.commands.serve import leave_a_core
from dirl_cli.models.tiny import Tiny
from dirl_cli.rollout.sampler import NewBlock, Sampler
from dirl_cli.text import counted
from dirl_cli.types import Decoding, Trajectory

QUESTIONS = [f"Tom has {i} pens. Tom buys {i % 7 + 2}. How many pens?" for i in range(32)]
SLOTS = 16
DECODINGS = (  # as requests say them, in turn
    {"temperature": 1.0, "threshold": 0.5},
    {"temperature": 0.7, "top_k": 20, "strategy": "low_confidence_static", "denoising_steps": 2},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--model", help="a directory; the embedded model of random weights if left out")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--key", default=secrets.token_urlsafe(16))
    parser.add_argument("--pid", type=int, help="of that server, to watch its memory")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        model = options.model
        if not model:
            model = f"{directory}/model"
            Tiny().load("float32", "cpu").save(Path(model))
        sampler = load_sampler(model, device="cpu", dtype="float32", max_batch=SLOTS)
        asked = requests_of(sampler, options.tokens)
        expected = expect(sampler, asked)
        before = rates_alone(sampler, asked)
        if options.url:
            served = load(options, options.url, options.pid, asked, expected)
        else:
            with own_server(model, options.key) as (url, pid):
                served = load(options, url, pid, asked, expected)
        after = rates_alone(sampler, asked)  # since a machine is not always as fast
        for threads, rate in before.items():
            ratio = 2 * served / (rate + after[threads])
            print(
                f"the engine alone on {counted(threads, 'thread')}, before and after: {rate:.0f} and"
                f" {after[threads]:.0f} tokens a second; served, of their mean: {ratio:.2f}"
            )


def requests_of(sampler: Sampler, tokens: int) -> list[dict]:
    """The bodies that clients send: questions as token ids, each with a seed and a decoding."""
    tokenizer = sampler.lm.require_tokenizer()
    bodies = []
    for i, question in enumerate(QUESTIONS):
        prompt_ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        bodies.append({"prompt": prompt_ids, "seed": i, "max_tokens": tokens, **DECODINGS[i % len(DECODINGS)]})
    return bodies


def expect(sampler: Sampler, asked: list[dict]) -> list[Trajectory]:
    """The answer to each request."""
    answers: dict[int, Trajectory] = {}
    for which in range(len(DECODINGS)):
        indices = range(which, len(asked), len(DECODINGS))
        prompts = [asked[i]["prompt"] for i in indices]
        seeds = [asked[i]["seed"] for i in indices]
        for place, _sample, trajectory in sampler.stream(prompts, 1, decoding_of(sampler, asked[which]), seeds=seeds):
            answers[indices[place]] = trajectory
    return [answers[i] for i in range(len(asked))]


def rates_alone(sampler: Sampler, asked: list[dict]) -> dict[int, float]:
    """Tokens a second of the engine alone, by its threads: those that a server leaves it, and all."""
    everything = torch.get_num_threads()
    leave_a_core()
    served = torch.get_num_threads()
    rates = {}
    for threads in sorted({served, everything}):
        torch.set_num_threads(threads)
        rates[threads] = batch_rate(sampler, asked)
    torch.set_num_threads(everything)
    return rates


def batch_rate(sampler: Sampler, asked: list[dict], seconds: float = 10.0) -> float:
    """Tokens a second of the engine alone, its batch kept full with the same requests in turn."""
    decodings = [decoding_of(sampler, body) for body in asked]
    longest = max(len(body["prompt"]) + body["max_tokens"] for body in asked)
    batch = sampler.open_batch(longest + -longest % sampler.lm.block_size)  # whole blocks
    tokens = added = 0
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        while batch.has_room(decodings[added % len(asked)]):
            i = added % len(asked)
            batch.add(added, 0, asked[i]["prompt"], decodings[i])
            added += 1
        tokens += sum(len(news.token_ids) for news in batch.step() if isinstance(news, NewBlock))
    batch.close()
    return tokens / seconds


def decoding_of(sampler: Sampler, body: dict) -> Decoding:
    """What a request's body asks for."""
    asked = {name: body[name] for name in DECODINGS[0] | DECODINGS[1] if name in body}
    return sampler.lm.decoding(Decoding(**asked, seed=body["seed"], max_new_tokens=body["max_tokens"]))


@contextmanager
def own_server(model: str, key: str) -> Iterator[tuple[str, int]]:
    """A server of its own process: its address and process id."""
    words = ["serve", f"model={model}", "serve.port=0", "device=cpu", "dtype=float32", f"rollout.max_batch={SLOTS}"]
    command = [sys.executable, "-c", "from dirl_cli.cli.app import app; app()", *words]
    environment = {**os.environ, "DIRL_SERVE_KEY": key}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    try:
        [url] = re.findall(r"http://\S+?(?=/v1)", process.stdout.readline())
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


class Clients:
    """Asks in several threads until the time is over. wrong: sentences about answers that are not as expected."""

    def __init__(self, url: str, key: str, asked: list[dict], expected: list[Trajectory]) -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {key}"}
        self.asked = asked
        self.expected = expected
        self.end = 0.0
        self.seconds: list[float] = []
        self.tokens = 0
        self.busy = 0  # answers that the server put off
        self.wrong: list[str] = []

    def run(self, clients: int, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        threads = [threading.Thread(target=self._ask_on, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask_on(self, number: int) -> None:
        with httpx.Client(headers=self.headers, timeout=600, verify=False) as client:  # no certificates to load
            i = number
            while time.perf_counter() < self.end:
                i = (i + 1) % len(self.asked)
                began = time.perf_counter()
                is_stream = number % 2 == 1
                token_ids, logprobs, status = self._ask(client, self.asked[i], is_stream)
                if status == 429:
                    self.busy += 1
                    time.sleep(1)
                    continue
                self.seconds.append(time.perf_counter() - began)
                self.tokens += len(token_ids)
                self._check(i, token_ids, logprobs, status)

    def _ask(self, client: httpx.Client, body: dict, is_stream: bool) -> tuple[list[int], list[float], int]:
        """Tokens and log-probs of an answer, and the status."""
        if not is_stream:
            response = client.post(f"{self.url}/v1/completions", json=body)
            if response.status_code != 200:
                return [], [], response.status_code
            trajectory = response.json()["choices"][0]["trajectory"]
            return trajectory["token_ids"], trajectory["logprobs"], 200

        token_ids: list[int] = []
        logprobs: list[float] = []
        with client.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                content = line.removeprefix("data: ")
                if content and content != "[DONE]" and "choices" in content:
                    trajectory = json.loads(content)["choices"][0]["trajectory"]
                    token_ids += trajectory["token_ids"]
                    logprobs += trajectory["logprobs"]
            return token_ids, logprobs, response.status_code

    def _check(self, i: int, token_ids: list[int], logprobs: list[float], status: int) -> None:
        one = self.expected[i]
        if status != 200:
            self.wrong.append(f"request {i} got status {status}")
        elif token_ids != one.token_ids:
            self.wrong.append(f"request {i} got other tokens")
        elif max(abs(a - b) for a, b in zip(logprobs, one.logprobs, strict=True)) > 1e-3:
            self.wrong.append(f"request {i} got other log-probs")


def load(
    options: argparse.Namespace, url: str, pid: int | None, asked: list[dict], expected: list[Trajectory]
) -> float:
    """Ask for so many minutes and print what came of it. pid: of the server. Returns tokens a second."""
    seconds = options.minutes * 60
    clients = Clients(url, options.key, asked, expected)
    clients.run(options.clients, seconds / 10)
    before = memory_of(pid)
    clients.seconds.clear()
    clients.tokens = 0
    began = time.perf_counter()
    clients.run(options.clients, seconds)
    served = clients.tokens / (time.perf_counter() - began)

    ordered = sorted(clients.seconds)
    if not ordered:
        raise SystemExit("no answer came in time: give more minutes")
    last = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    print(f"{options.clients} clients, {len(ordered)} answers, {clients.busy} put off: {served:.0f} tokens a second")
    print(f"an answer: median {1000 * median(ordered):.0f} ms, 99th percentile {1000 * last:.0f} ms")
    if pid:
        print(f"the server's memory grew by {(memory_of(pid) - before) / 2**20:.1f} MB, of {before / 2**20:.0f}")
    for sentence in clients.wrong[:10]:
        print(sentence)
    print(f"{len(clients.wrong)} answers were not the sampler's")
    if clients.wrong:
        raise SystemExit(1)
    return served


def memory_of(pid: int | None) -> int:
    """The bytes in memory of a process and of those that it has started."""
    if pid is None:
        return 0
    server = psutil.Process(pid)
    return sum(process.memory_info().rss for process in [server, *server.children(recursive=True)])


if __name__ == "__main__":
    main()
