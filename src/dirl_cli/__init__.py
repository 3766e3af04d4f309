"""Post-train block-diffusion language models; from Python: `from dirl_cli import Decoding, load_sampler, score`."""

from typing import TYPE_CHECKING

from dirl_cli.types import Decoding, Problem, Trajectory

if TYPE_CHECKING:
    from dirl_cli.api import load_sampler, score

__all__ = ["Decoding", "Problem", "Trajectory", "load_sampler", "score"]


def __getattr__(name: str) -> object:
    if name in ("load_sampler", "score"):  # torch is imported only where it is used
        from dirl_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
