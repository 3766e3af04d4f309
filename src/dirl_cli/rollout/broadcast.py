"""A process that sends a file's bytes to several others at once, or receives them: torch's gloo, over TCP.

A process of its own, since who waits in gloo for a peer that hangs cannot be interrupted, and since gloo's ports take
any connection: the worst that can come over them ends this process. `transfers.py` starts it. Each line of its standard
input tells of a meeting, or is `END`; it tells what comes of them in lines of JSON. At its input's end, which is also
that of the process that has started it, it removes the directory that it was given, and ends.
"""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from dirl_cli.rollout.meeting import END, Meeting, address_towards


class Transfer(Thread):
    """One meeting. path: of the file that is sent, or received. group: the connections, which last until END.

    is_over: whether it has been told what came of it.
    """

    def __init__(self, path: Path, meeting: Meeting) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.meeting = meeting
        self.is_sender = meeting.rank == 0
        self.group: ProcessGroupGloo | None = None
        self.is_over = False

    def run(self) -> None:
        outcome = self._outcome()
        self.is_over = True
        tell(outcome)

    def _outcome(self) -> dict[str, Any]:
        """What is told at the end. A failure is its own where it has met nobody, or cannot read or write the file."""
        try:
            store = self._store()
        except (OSError, RuntimeError) as error:
            return {"failure": f"{self.meeting.host} port {self.meeting.port}: {sentence(error)}", "is_own": True}
        try:
            self.group = self._group(store)
            with self.path.open("rb" if self.is_sender else "wb") as file:
                self._pass(file, self.group)
        except OSError as error:
            return {"failure": f"{self.path}: {error.strerror}", "is_own": True}
        except RuntimeError as error:
            return {"failure": sentence(error), "is_own": False}
        return {"is_whole": True}

    def _store(self) -> TCPStore:
        """Where each finds the others' addresses. The one that sends listens at its host's address alone."""
        host, size = self.meeting.host, self.meeting.size
        timeout = timedelta(seconds=self.meeting.step)  # to connect, since the one that sends listens already
        if not self.is_sender:
            return TCPStore(host, self.meeting.port, size, False, timeout, wait_for_workers=False)

        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
        port = listener.getsockname()[1]
        descriptor = listener.detach()
        store = TCPStore(host, port, size, True, timeout, wait_for_workers=False, master_listen_fd=descriptor)
        tell({"port": port})
        return store

    def _group(self, store: TCPStore) -> ProcessGroupGloo:
        """The connections of each to each, once all have come."""
        host = self.meeting.host
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        own = host if self.is_sender else address_towards(host, self.meeting.port)
        options._devices = [ProcessGroupGloo.create_device(hostname=own)]
        options._timeout = timedelta(seconds=self.meeting.join)
        return ProcessGroupGloo(store, self.meeting.rank, self.meeting.size, options)

    def _pass(self, file: BinaryIO, group: ProcessGroupGloo) -> None:
        """Send the file's bytes, or write what comes, a part at a time."""
        timeout = timedelta(seconds=self.meeting.step)
        left = self.meeting.bytes
        room = bytearray(min(self.meeting.part, left))
        while left:
            part = memoryview(room)[:left]
            if self.is_sender:
                file.readinto(part)  # type: ignore[attr-defined]
            tensor = torch.frombuffer(part, dtype=torch.uint8)  # which shares its memory
            group.broadcast(tensor, 0, timeout).wait()  # type: ignore[attr-defined]
            if not self.is_sender:
                file.write(part)
            left -= len(part)


def sentence(error: Exception) -> str:
    """What an error of torch says, without the place in gloo's code that some begin with, and without the stack."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", line) or type(error).__name__


def tell(news: Mapping[str, Any]) -> None:
    print(json.dumps(news), flush=True)


def main(directory: str | None = None) -> None:
    """Take part in the meetings that standard input tells of. directory: in which files are received."""
    transfer: Transfer | None = None
    for line in sys.stdin:
        if line.strip() != END:
            told = json.loads(line)
            transfer = Transfer(Path(told["path"]), Meeting(**told["meeting"]))
            transfer.start()
        elif transfer and transfer.is_over:
            transfer.join()
            transfer = None  # and with it its ports
            tell({"is_free": True})
        else:
            break  # what is given up may wait for a peer that hangs
    if directory:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
