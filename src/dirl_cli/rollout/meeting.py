"""Where processes meet to which weights are sent: what the one that sends tells the others, and itself."""

import socket
from dataclasses import dataclass

from dirl_cli.ranges import Count, Natural, Positive

END = "end"  # on the standard input of a process that takes part: let the peers go, or give up what is under way


@dataclass(frozen=True)
class Meeting:
    """Where and how a file's bytes pass from one process to several.

    host, port: where all meet, at the one that sends; it is told port 0 and takes a free one. rank: 0 of the one that
    sends. size: how many take part. bytes: of the file, in parts of `part`. join: seconds in which all have to come.
    step: in which each part has to arrive.
    """

    host: str
    port: Natural
    rank: Natural
    size: Count
    bytes: Count
    part: Count
    join: Positive
    step: Positive


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to a host, by which that reaches it too. Raises OSError where there is none."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # which sends nothing
        return str(probe.getsockname()[0])
