"""Saved models on the Hub: the real client against a small stand-in on this machine."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi

from dirl_cli.errors import DirlError
from dirl_cli.models.save import push, require_pushable
from tests.helpers.small import small_lm


class Hub(ThreadingHTTPServer):
    """Takes commits with the token `good`. repositories: who sees each; files: what they hold, all together."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        path = urlsplit(self.path).path
        if self.headers["Authorization"] != "Bearer good":
            self.reply(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            self.reply(status, {"url": f"{self.server.address}/{name}", "name": name})
            self.server.repositories.setdefault(name, asked["visibility"])
        elif "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.reply(200, {"files": modes})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[line["value"]["path"]]
            self.reply(200, {"success": True, "commitUrl": f"{self.server.address}/lab/new/commit/1", "commitOid": "1"})
        elif "/tree/" in path or path.startswith("/api/models/"):
            listed = [{"type": "file", "path": name, "size": 1, "oid": "1"} for name in self.server.files]
            named = {"id": "lab/new", "sha": "1", "siblings": [{"rfilename": file["path"]} for file in listed]}
            self.reply(200, listed if "/tree/" in path else named)
        else:
            self.reply(200, {})

    def reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def saved(tmp_path) -> Path:
    small_lm().save(tmp_path / "model", "# A model\n")
    return tmp_path / "model"


def use(hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi(hub.address, token)
    monkeypatch.setattr("dirl_cli.models.save.create_repo", api.create_repo)
    monkeypatch.setattr("dirl_cli.models.save.upload_folder", api.upload_folder)


def test_every_file_goes_into_a_private_repository(hub, saved, monkeypatch):
    use(hub, "good", monkeypatch)
    assert push(saved, "lab/new") == f"{hub.address}/lab/new"
    assert hub.repositories == {"lab/new": "private"}
    assert hub.files == {file.name: file.read_bytes() for file in saved.iterdir()}


def test_shards_of_an_earlier_model_do_not_stay(hub, saved, monkeypatch):
    use(hub, "good", monkeypatch)
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    hub.repositories["lab/new"] = "public"
    hub.files = {".gitattributes": b"", **dict.fromkeys(old, b"old")}
    push(saved, "lab/new")
    assert hub.files.keys() == {".gitattributes", *(file.name for file in saved.iterdir())}
    assert hub.repositories == {"lab/new": "public"}


def test_a_push_that_fails_says_where_the_model_is_and_how_to_push_it_later(hub, saved, monkeypatch):
    later = (
        rf"the model is safe in {saved}, but not on the Hub \(.*\): push it later with `hf upload lab/new {saved} --p"
    )
    use(hub, "wrong", monkeypatch)
    with pytest.raises(DirlError, match=later) as told:
        push(saved, "lab/new")
    assert "Invalid username or password" in str(told.value) and "\n" not in str(told.value)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(DirlError, match=later):
        push(saved, "lab/new")


def test_a_push_that_cannot_succeed_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr("dirl_cli.models.save.get_token", lambda: "good")
    require_pushable(None)
    require_pushable("lab/new")
    for name in ("model", "lab/new/model", "lab/a new", "../model"):
        with pytest.raises(DirlError, match="is no name on the Hub: give OWNER/NAME"):
            require_pushable(name)
    monkeypatch.setattr("dirl_cli.models.save.get_token", lambda: None)
    with pytest.raises(DirlError, match="push_to_hub=lab/new needs a token of the Hub: run `hf auth login` first"):
        require_pushable("lab/new")
