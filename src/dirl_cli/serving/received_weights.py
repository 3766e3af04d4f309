"""Weights that a run sends to its servers: received into a directory of their own, to be read from there."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from transformers import PreTrainedConfig

from dirl_cli.models.safe_files import WEIGHTS
from dirl_cli.ranges import types_of
from dirl_cli.rollout.meeting import Meeting
from dirl_cli.rollout.server_client import BROKEN_OFF
from dirl_cli.rollout.transfers import TransferFailed, Transfers
from dirl_cli.serving.refusals import Refusal
from dirl_cli.serving.request_body import checked_value


class WeightsReceiver:
    """Receives weights. Who sends them is met where a request says; the bytes are held to its sum by who reads them.

    config: of their model, which makes of them what is read as one. directory: of all that is received, which its
    processes remove where this one is killed; None until there is any.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.directory: Path | None = None
        self.transfers = Transfers()

    async def receive(self, meeting: Meeting) -> Path:
        """A directory with the weights that are sent at a meeting, which its reader is to remove.

        Raises Refusal where they do not come whole. Then, and where it is given up, nothing is left of them.
        """
        if self.directory is None:
            self.directory = Path(mkdtemp(prefix="dirl-weights-"))  # which nobody else may read
            self.transfers = Transfers(str(self.directory))
        directory = Path(mkdtemp(dir=self.directory))
        try:
            await self._fill(directory, meeting)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory

    async def _fill(self, directory: Path, meeting: Meeting) -> None:
        """Write what is sent at a meeting, and whose weights it is. Raises Refusal where it does not come whole."""
        try:
            async with self.transfers.process() as transfer:
                transfer.begin(directory / WEIGHTS, meeting)
                await transfer.news()
        except TransferFailed as failure:
            status = 503 if failure.is_own else BROKEN_OFF
            raise Refusal(status, f"the weights did not come whole ({failure}): send them again") from failure
        self.config.save_pretrained(directory)

    async def close(self) -> None:
        """Leave neither processes nor files."""
        await self.transfers.close()
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def checked_meeting(value: Any) -> Meeting:
    """Where a request says that weights are sent. Raises Refusal where it does not."""
    types = types_of(Meeting)
    if not isinstance(value, Mapping) or value.keys() != types.keys():
        raise Refusal(400, f"broadcast must hold {', '.join(types)}: give them all, as `dirl rl` does", "broadcast")
    return Meeting(**{name: checked_value(f"broadcast.{name}", value[name], types[name]) for name in types})
