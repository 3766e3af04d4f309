"""The released SGLang's own code, as far as it runs without what it is built on: its loops, its registry, its hooks.

Its modules of `srt/dllm` and `srt/plugins` are imported as they are; those that they import only for types, and that
want CUDA packages, are stood in for by empty ones. Single methods are compiled from the files that hold them.
"""

import ast
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

RELEASE = Path(sys.prefix) / "sglang"  # where `make test` puts it
SRT = RELEASE / "sglang" / "srt"
ABSENT = "SGLang is not there: make test brings it into .venv/sglang"

STOOD_IN = {
    "sglang.srt.arg_groups.overrides": ["resolving_view"],
    "sglang.srt.configs.model_config": ["ModelConfig"],
    "sglang.srt.server_args": ["ServerArgs"],
    "sglang.srt.layers.logits_processor": ["LogitsProcessorOutput"],
    "sglang.srt.model_executor.forward_batch_info": ["ForwardBatch"],
    "sglang.srt.model_executor.model_runner": ["ModelRunner"],
    "sglang.srt.utils": [],
}


@contextmanager
def imported() -> Iterator[ModuleType]:
    """Its registry of algorithms, and what imports SGLang here; nothing of it stays imported."""
    before = set(sys.modules)
    try:
        for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
            package = ModuleType(name)
            package.__path__ = [str(RELEASE.joinpath(*name.split(".")))]
            sys.modules[name] = package
        for name, attributes in STOOD_IN.items():
            stand_in = ModuleType(name)
            vars(stand_in).update({attribute: type(attribute, (), {}) for attribute in attributes})
            sys.modules[name] = stand_in
        sys.modules["sglang.srt.utils"].is_npu = lambda: False  # type: ignore[attr-defined]
        yield import_module("sglang.srt.dllm.algorithm")
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("sglang") or name.endswith("sglang_algorithm"):
                del sys.modules[name]


def source(file: str) -> str:
    """The text of one of its files."""
    return (SRT / file).read_text()


def released_methods(file: str, owner: str, *names: str, **names_in_file: Any) -> dict[str, Any]:
    """Methods of a class, compiled from its file. names_in_file: what they find there."""
    classes = [node for node in ast.parse(source(file)).body if isinstance(node, ast.ClassDef) and node.name == owner]
    chosen = [node for node in classes[0].body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in chosen} == set(names)
    for node in chosen:
        for argument in (*node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        node.returns = None
    scope = {"array": array, **names_in_file}
    exec(compile(ast.Module(chosen, []), file, "exec"), scope)
    return {name: scope[name] for name in names}


class Reason(SimpleNamespace):
    """Why a request has ended, by keyword as SGLang makes it."""
