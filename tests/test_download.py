"""`dirl download` against a small stand-in for the Hub on this machine."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789" * 4
WEIGHTS = bytes(range(256)) * 4000
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "modeling.py": b"import os", "photo.png": b"png"}


class Hub(BaseHTTPRequestHandler):
    """Serves the repository lab/model; lab/secret is gated; any other name is unknown.

    The server's `broken` makes it hang up in the middle of the weights; `served` lists what it sent.
    """

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/api/models/lab/secret/revision/main":
            self.reply(403, b"gated", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif path == "/api/models/lab/model/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": "lab/model", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/api/models/lab/model/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": len(b), "oid": name} for name, b in FILES.items()]
            self.reply(200, json.dumps(tree).encode())
        elif path.startswith(f"/lab/model/resolve/{COMMIT}/"):
            self.send_file(path.rpartition("/")[2])
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name):
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET":
            self.server.served.append(name)
        self.reply(200, FILES[name], headers, end=1000 if self.server.broken else None)

    def reply(self, status, content, headers=None, end=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.served, server.broken = [], False
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def download(hub, tmp_path, *words):
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
    dirl = Path(sys.executable).with_name("dirl")
    return subprocess.run([dirl, "download", *words], env=environment, cwd=tmp_path, capture_output=True, text=True)


def test_what_a_model_needs_is_fetched_and_its_place_is_printed(hub, tmp_path):
    result = download(hub, tmp_path, "model=lab/model", "to=here")
    assert result.returncode == 0, result.stderr
    place = Path(result.stdout.strip())
    assert place == tmp_path / "here"
    assert (place / "model.safetensors").read_bytes() == WEIGHTS
    assert not (place / "modeling.py").exists() and not (place / "photo.png").exists()


def test_an_interrupted_download_is_told_and_goes_on(hub, tmp_path):
    hub.broken = True
    broken = download(hub, tmp_path, "model=lab/model")
    assert broken.returncode == 1, broken.stdout
    assert broken.stderr.splitlines()[-1].startswith("dirl download: "), broken.stderr
    assert "Traceback" not in broken.stderr
    hub.broken, hub.served = False, []
    result = download(hub, tmp_path, "model=lab/model")
    assert result.returncode == 0, result.stderr
    assert (Path(result.stdout.strip()) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.served == ["model.safetensors"]  # config.json is there already


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=lab/none"], "dirl download: the Hub has no lab/none"),
        (["model=lab/secret"], "dirl download: lab/secret is gated"),
        (["model=a/b/c"], "dirl download: a/b/c is neither a directory nor a name on the Hub"),
        (["model=tiny"], "dirl download: model=tiny is made on the spot: there is nothing to download"),
        (["model=home"], "dirl download: home is a directory here: there is nothing to download"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_one_sentence(hub, tmp_path, words, sentence):
    (tmp_path / "home").mkdir()
    result = download(hub, tmp_path, *words)
    assert result.returncode == 1
    assert result.stderr.startswith(sentence)
    assert len(result.stderr.splitlines()) == 1


def test_a_hub_out_of_reach_is_told_in_one_sentence(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    result = download(hub, tmp_path, "model=sdar8b")
    assert result.returncode == 1
    assert result.stderr.startswith("dirl download: the Hub cannot be reached for JetLM/SDAR-8B-Chat")
    assert len(result.stderr.splitlines()) == 1
