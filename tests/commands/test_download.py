"""`dirl download` against a small stand-in for the Hub on this machine."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import close_session, constants
from typer.testing import CliRunner

from dirl_cli.cli.app import app
from dirl_cli.commands.download import room_for
from dirl_cli.data.files import ProblemFile
from dirl_cli.errors import DirlError
from dirl_cli.hub import local_snapshot
from tests.helpers.hub import COMMIT, Hub, sha256

WEIGHTS = random.Random(0).randbytes(1_000_000)
PROBLEMS = b'{"question": "1+1?", "ground_truth_answer": "2"}\n' * 100
MODEL = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "modeling.py": b"import os",
    "photo.png": b"png",
    "original/model.safetensors": b"another copy",
}
REPOSITORIES = {
    "models/lab/model": MODEL,
    "models/lab/old": {"config.json": b"{}", "pytorch_model.bin": WEIGHTS},
    "models/lab/secret": MODEL,
    "models/JetLM/SDAR-8B-Chat": MODEL | {"twin.safetensors": WEIGHTS},
    "datasets/lab/exams": {"exams.json": PROBLEMS},
    "datasets/lab/photos": {"README.md": b"photos", "one.png": b"png"},
    "datasets/Auraithm/Light-MATH-RL": {"README.md": b"problems", "data/train.jsonl": PROBLEMS},
} | {
    f"datasets/Auraithm/{name}": {"README.md": b"problems", f"{name}.json": b"[]"}
    for name in ("MATH500", "GSM8K", "AIME2024", "AIME2025", "OlympiadBench")
}
DIRL = Path(sys.executable).with_name("dirl")


@pytest.fixture
def hub():
    server = Hub(REPOSITORIES)
    server.gated = {"models/lab/secret", "datasets/lab/exams"}
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.closed.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(hub, tmp_path):
    """Starts `dirl download` with the words given, in a directory and with a cache of its own."""
    proxies = {key: "" for key in os.environ if key.lower().endswith("_proxy")}
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}

    def start(*words, **more):
        return subprocess.Popen(
            [DIRL, "download", *words],
            env=os.environ | proxies | environment | more,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def fetched(download):
    """What a download that succeeds prints."""

    def run(*words, **environment):
        process = download(*words, **environment)
        printed, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        return printed

    return run


@pytest.fixture
def refusal(hub, tmp_path, monkeypatch):
    """The one sentence with which a download, in this process, is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def run(*words):
        result = CliRunner().invoke(app, ["download", *words], env={"HYDRA_FULL_ERROR": "0"})
        assert result.exit_code == 1
        (sentence,) = result.stderr.splitlines()
        return sentence.removeprefix("dirl download: ")

    yield run
    close_session()


@pytest.fixture
def snapshot(tmp_path):
    return tmp_path / f"home/hub/models--lab--model/snapshots/{COMMIT}"


@pytest.fixture
def partial(tmp_path):
    """Where the weights gather."""
    return tmp_path / f"home/hub/models--lab--model/blobs/{sha256(WEIGHTS)}.incomplete"


def test_what_a_model_needs_is_fetched_into_the_cache(fetched, snapshot):
    printed = fetched("model=lab/model")
    assert {file.name for file in snapshot.iterdir()} == {"config.json", "model.safetensors"}
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert printed.splitlines()[0] == "lab/model: 2 files, 1.0 MB, none of it here"
    assert printed.splitlines()[-2:] == [f"lab/model is in {snapshot}", "Next: dirl eval model=lab/model"]


def test_to_puts_a_repository_into_a_directory_and_several_into_directories_of_it(fetched, tmp_path):
    assert "Next: dirl eval model=here" in fetched("lab/model", "--to", "here")
    assert (tmp_path / "here/model.safetensors").read_bytes() == WEIGHTS
    printed = fetched("lab/model", "data=light_math_rl", "--to", "there")
    data = "data=light_math_rl data.path=there/Auraithm/Light-MATH-RL"
    assert printed.splitlines()[-1] == f"Next: dirl rl model=there/lab/model {data}"
    assert (tmp_path / "there/lab/model/config.json").exists()
    assert (tmp_path / "there/Auraithm/Light-MATH-RL/data/train.jsonl").read_bytes() == PROBLEMS
    assert not list(tmp_path.glob("home/hub/*/snapshots"))


def test_choices_and_ids_are_fetched_together_and_the_next_commands_told(fetched, hub):
    printed = fetched("model=sdar8b", "bench=all", "data=light_math_rl", "lab/model", "datasets/Auraithm/MATH500")
    assert len([line for line in printed.splitlines() if " is in " in line]) == 8  # one was named twice
    assert printed.splitlines()[-2:] == [
        "Next: dirl rl model=lab/model data=light_math_rl",
        "Next: dirl eval model=lab/model bench=all",
    ]


@pytest.mark.parametrize("place", [[], ["--to", "lab/model"]])
def test_what_is_here_is_not_fetched_again(fetched, hub, place):
    fetched("lab/model", *place)
    hub.served.clear()
    printed = fetched("lab/model", *place)
    assert printed.splitlines()[:2] == ["lab/model: 2 files, 1.0 MB, all here", "Nothing to fetch"]
    assert hub.served == []


def test_what_the_cache_has_is_copied_to_a_directory(fetched, hub, tmp_path):
    fetched("lab/model")
    hub.served.clear()
    fetched("lab/model", "--to", "here")
    assert hub.served == [] and (tmp_path / "here/model.safetensors").read_bytes() == WEIGHTS


def test_a_dry_run_lists_files_and_sizes_and_fetches_nothing(fetched, hub, tmp_path, partial):
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:300_000])
    printed = fetched("model=lab/model", "bench=math500", "dry_run=true").splitlines()
    assert printed[:-1] == [
        "lab/model: 2 files, 1.0 MB, 300.0 kB of it here",
        "    2 bytes  config.json",
        "     1.0 MB  model.safetensors  (300.0 kB of it here)",
        "Auraithm/MATH500: 2 files, 10 bytes, none of it here",
        "    8 bytes  README.md",
        "    2 bytes  MATH500.json",
    ]
    assert printed[-1].startswith("700.0 kB to fetch, ") and " free in " in printed[-1]
    assert hub.served == [] and [file.name for file in tmp_path.rglob("*") if file.is_file()] == [partial.name]


def test_a_server_that_hangs_up_is_asked_for_the_rest(fetched, hub, snapshot):
    hub.cuts = [300_000, 200_000]
    fetched("lab/model")
    assert ranges(hub) == ["bytes=0-", "bytes=300000-", "bytes=500000-"]
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_falls_silent_is_replaced(fetched, hub, snapshot):
    hub.cuts, hub.silent = [300_000], True
    fetched("lab/model", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert ranges(hub) == ["bytes=0-", "bytes=300000-"]
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("place", [[], ["--to", "here"]])
def test_a_killed_download_goes_on_from_the_byte_it_reached(download, fetched, hub, snapshot, tmp_path, place):
    hub.cuts, hub.silent = [300_000], True
    killed = download("lab/model", *place)
    wait_for(lambda: any(file.stat().st_size == 300_000 for file in tmp_path.rglob("*.incomplete")))
    killed.kill()
    killed.wait()
    assert "300.0 kB of it here" in fetched("lab/model", *place)
    assert ranges(hub) == ["bytes=0-", "bytes=300000-"]
    assert ((tmp_path / "here" if place else snapshot) / "model.safetensors").read_bytes() == WEIGHTS


def test_ctrl_c_ends_a_download_at_once_and_keeps_what_came(download, hub, partial):
    hub.cuts, hub.silent = [300_000], True
    process = download("lab/model")
    wait_for(lambda: partial.exists() and partial.stat().st_size == 300_000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert partial.stat().st_size == 300_000


def ranges(hub):
    """The parts in which the large files were asked for."""
    return [span for _, span, _ in hub.served if span]


def wait_for(reached):
    deadline = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_damaged_bytes_are_noticed_and_fetched_anew(fetched, hub, partial, snapshot):
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" + WEIGHTS[1:300_000])
    fetched("lab/model")
    assert ranges(hub) == ["bytes=300000-", "bytes=0-"]
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_cannot_send_a_part_sends_all(fetched, hub, partial, snapshot):
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:300_000])
    hub.knows_ranges = False
    fetched("lab/model")
    assert [length for _, span, length in hub.served if span] == [1_000_000]
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("sent", [WEIGHTS[::-1], WEIGHTS[:-1]], ids=["other bytes", "too few bytes"])
def test_a_file_that_is_not_what_the_hub_names_is_refused(refusal, hub, snapshot, partial, sent):
    hub.instead = sent
    assert refusal("lab/model").startswith("model.safetensors comes damaged (not of the sha256 that the Hub names)")
    assert not partial.exists() and not snapshot.exists()


def test_the_token_goes_to_the_hub_and_nowhere_else(fetched, refusal, hub, monkeypatch):
    fetched("lab/model", HF_TOKEN="good")
    assert hub.strangers == [None]
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert refusal("lab/model") == (
        "lab/model: the Hub does not know your token: `hf auth login` with another, or correct HF_TOKEN (401)"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name what to download, such as model=sdar8b, bench=all, data=bigmath or OWNER/NAME"),
        (["lab/none"], "the Hub has no lab/none, or it is private: check the name"),
        (["lab/secret"], "lab/secret is gated: accept its terms at http"),
        (["lab/old"], "lab/old has no weights in safetensors"),
        (["datasets/lab/photos"], "lab/photos holds no JSON, JSONL or Parquet file"),
        (["a/b/c"], "a/b/c is neither here nor a name on the Hub (OWNER/NAME)"),
        (["sdar8b"], "sdar8b: did you mean model=sdar8b?"),
        (["model=tiny"], "model=tiny names no repository of the Hub: there is nothing to download"),
        (["model=home"], "home is here, and commands read it: there is nothing to download"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_one_sentence(refusal, tmp_path, words, sentence):
    (tmp_path / "home").mkdir(exist_ok=True)
    assert refusal(*words).startswith(sentence)


def test_the_page_of_a_gated_data_set_is_told(refusal, hub):
    page = f"{hub.endpoint}/datasets/lab/exams"
    assert refusal("datasets/lab/exams").startswith(f"lab/exams is gated: accept its terms at {page}, then")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(429, "the Hub takes no more requests for now: wait"), (503, "the Hub has trouble: try again later")],
)
def test_a_hub_that_refuses_is_told_in_one_sentence(refusal, hub, status, sentence):
    hub.statuses = [status]
    assert refusal("lab/model").startswith(f"lab/model: {sentence}")


def test_a_hub_out_of_reach_is_told_in_one_sentence(refusal, hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    assert refusal("model=sdar8b").startswith(f"{hub.endpoint} cannot be reached for JetLM/SDAR-8B-Chat (")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal("model=sdar8b").startswith("HF_HUB_OFFLINE is set")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_one_sentence(refusal, partial):
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    assert refusal("lab/model").startswith("lab/model cannot be written (No space left on device): make room")


def test_room_is_made_sure_of_before_anything_is_fetched(tmp_path):
    assert room_for(10**6, tmp_path / "not/yet/there").startswith("1.0 MB to fetch, ")
    with pytest.raises(DirlError, match=r"^1\.0 EB are to be fetched and .* are free in .*: make room"):
        room_for(10**18, tmp_path / "not/yet/there")


def test_what_is_not_here_is_told_with_the_words_that_fetch_it(fetched, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    for repo_id, kind, words in [
        ("JetLM/SDAR-8B-Chat", "model", "model=sdar8b"),
        ("Auraithm/MATH500", "dataset", "bench=math500"),
        ("Auraithm/BigMath-RL", "dataset", "data=bigmath"),
        ("lab/model", "model", "lab/model"),
        ("lab/data", "dataset", "datasets/lab/data"),
    ]:
        with pytest.raises(DirlError, match=f"{repo_id} is not on this machine: run `dirl download {words}` first"):
            local_snapshot(repo_id, kind)
    fetched("bench=math500")
    found = local_snapshot("Auraithm/MATH500", "dataset")
    assert (found / "MATH500.json").read_bytes() == b"[]"
    (found / "MATH500.json").unlink()
    with pytest.raises(DirlError, match="Auraithm/MATH500 is only in part on this machine: run"):
        local_snapshot("Auraithm/MATH500", "dataset")


def test_what_was_downloaded_is_read_from_the_cache(fetched, monkeypatch, tmp_path):
    fetched("data=light_math_rl")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home/hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    problems = ProblemFile("mine", "Auraithm/Light-MATH-RL").problems()
    assert len(problems) == 100 and problems[0].answer == "2"
