"""What SGLang finds in its environment by the entry point `sglang.srt.plugins`, and calls in each of its processes."""

from importlib.metadata import version

from dirl_cli.errors import DirlError
from dirl_cli.rollout.sglang_blocks import ALGORITHM, VERSION

FORWARD = "sglang.srt.managers.tp_worker.TpModelWorker._forward_batch_generation_dllm"


def register() -> None:
    """Make `--dllm-algorithm Dirl` known, and have responses tell of blocks.

    Raises DirlError for another version of SGLang, which its log then shows.
    """
    require_version(version("sglang"), "this environment")
    from sglang.srt.dllm import algorithm as algorithms
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from dirl_cli.rollout.sglang_algorithm import Dirl, keep_records

    algorithms.algo_name_to_cls[ALGORITHM] = Dirl
    HookRegistry.register(FORWARD, keep_records, HookType.AROUND)


def require_version(installed: str, where: str) -> None:
    """Raises DirlError for another version of SGLang than the one that this was written to."""
    if installed != VERSION and not installed.startswith(f"{VERSION}.post"):
        raise DirlError(
            f"{where} has SGLang {installed}, and rollout=sglang works with {VERSION} alone, whose code it was written"
            f" to: pip install sglang=={VERSION}"
        )
