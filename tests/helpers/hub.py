"""A stand-in for the Hub on this machine, which answers as the real one does and breaks off when told to."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event
from urllib.parse import urlsplit

COMMIT = "0123456789" * 4
LARGE = 1000  # bytes from which a file is kept in LFS; 10 MB on the real one


class Hub(ThreadingHTTPServer):
    """Serves `repositories`, such as {"models/lab/model": {"config.json": b"{}"}}; takes the token `good`, or none.

    cuts: after how many bytes each of the next answers with a large file breaks off; it hangs up, or falls silent where
    `silent` is set. statuses: what the next requests are refused with. instead: what it sends for a large file.
    served: name, Range and length of each answer. strangers: what the host of the large files was told of the token.
    """

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.cuts, self.statuses, self.served, self.gated, self.strangers = [], [], [], set(), []
        self.silent, self.knows_ranges, self.instead, self.closed = False, True, None, Event()

    def handle_error(self, *_):
        """Whoever asks may go away in the middle of an answer."""

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def large_files(self):
        return {
            sha256(content): (name, content) for files in self.repositories.values() for name, content in files.items()
        }


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        if self.server.statuses:
            return self.reply(self.server.statuses.pop(0), headers={"Retry-After": "0"})
        if found := re.fullmatch(r"/cdn/(\w+)", path):
            self.server.strangers.append(self.headers["Authorization"])
            return self.send_part(*self.server.large_files[found[1]])
        if self.headers["Authorization"] not in (None, "Bearer good"):
            return self.reply(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        for repository, files in self.server.repositories.items():
            kind, _, repo_id = repository.partition("/")
            if re.fullmatch(f"/api/{repository}(/revision/main)?", path):
                return self.reply_json(
                    {"id": repo_id, "sha": COMMIT, "siblings": [sibling(*file) for file in files.items()]}
                )
            if path == f"/api/{repository}/tree/{COMMIT}":
                return self.reply_json([entry(*file) for file in files.items()])
            address = repo_id if kind == "models" else repository
            if path.startswith(f"/{address}/resolve/{COMMIT}/"):
                if repository in self.server.gated:
                    return self.reply(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
                name = path.removeprefix(f"/{address}/resolve/{COMMIT}/")
                return self.resolve(name, files[name])
        return self.reply(401, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def resolve(self, name, content):
        """A small file, or the address of a large one on a host that must not see the token."""
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_oid(content)}"'}
        if len(content) < LARGE:
            if self.command == "GET":
                self.server.served.append((name, None, len(content)))
            return self.reply(200, content, headers)
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"'}
        location = f"http://localhost:{self.server.server_port}/cdn/{sha256(content)}"
        return self.reply(302, b"", headers | linked | {"Location": location})

    def send_part(self, name, content):
        content = self.server.instead or content
        asked = self.server.knows_ranges and re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(asked[1]) if asked else 0
        span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        end = self.server.cuts.pop(0) if self.server.cuts else None
        part = content[start : None if end is None else start + end]
        self.server.served.append((name, self.headers["Range"], len(part)))
        self.reply(206 if asked else 200, part, {"ETag": f'"{sha256(content)}"'} | span, len(content) - start)
        if end is not None:
            if self.server.silent:
                self.server.closed.wait(60)
            self.close_connection = True

    def reply_json(self, content):
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status, content=b"", headers=None, length=None):
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(content) if length is None else length),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def sibling(name, content):
    lfs = (
        {"lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 130}} if len(content) >= LARGE else {}
    )
    return {"rfilename": name, "size": len(content), "blobId": git_oid(content), **lfs}


def entry(name, content):
    lfs = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}, "xetHash": sha256(content)}
    large = lfs if len(content) >= LARGE else {}
    return {"type": "file", "path": name, "size": len(content), "oid": git_oid(content), **large}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
