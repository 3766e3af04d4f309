"""A network between a client and a server that a test can cut or let stand still."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Line:
    """Passes on what comes at `address` to a port of this machine. moves: bytes pass; cleared, they wait."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.is_cut = False
        self.lock = threading.Lock()  # so that no connection that is being made outlives a cut
        self.moves = threading.Event()
        self.moves.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop all connections, and any new one, until `mend`."""
        with self.lock:
            self.is_cut = True
            for end in self.ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self.ends.clear()

    def mend(self) -> None:
        self.is_cut = False

    def _accept(self) -> None:
        with suppress(OSError):  # of a listener that is closed
            while True:
                near, _ = self.listener.accept()
                with self.lock:
                    if self.is_cut:
                        near.close()
                        continue
                    far = socket.create_connection(("127.0.0.1", self.port))
                    self.ends += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                self.moves.wait()
                target.sendall(content)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(address: str) -> Iterator[Line]:
    """A line to a server at an address of this machine."""
    line = Line(int(address.rpartition(":")[2]))
    try:
        yield line
    finally:
        line.moves.set()
        line.cut()
        line.listener.shutdown(socket.SHUT_RDWR)  # which wakes who waits in `accept`
        line.listener.close()
