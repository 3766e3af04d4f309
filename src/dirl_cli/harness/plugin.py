"""Make `lm_eval --model dirl` work.

lm-evaluation-harness (0.4.13) reads no entry points: a model has to be in its registry before its command looks there.
So the wheel brings a line that Python runs as it starts, `dirl_lm_eval.pth`, which comes here where that command is
what is started, and does nothing else.
"""

import sys
from importlib.util import find_spec
from types import TracebackType

from dirl_cli.errors import DirlError

MODEL = "dirl_cli.harness.lm_eval_model:DirlModel"


def register() -> None:
    """Add `dirl` to lm-eval's models, where lm-eval is installed; imported only when it is asked for.

    Errors that a user can fix end lm-eval's command as they end `dirl`: in a sentence, without a traceback.
    """
    if find_spec("lm_eval") is None:
        return
    import lm_eval.models  # noqa: F401  # its own models first: it does not add them to a registry that has any
    from lm_eval.api.registry import model_registry

    if "dirl" not in model_registry:
        model_registry.register("dirl", target=MODEL)
    sys.excepthook = report_error


def report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a DirlError as a sentence, and any other as Python does."""
    if isinstance(error, DirlError):
        print(f"lm_eval: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
