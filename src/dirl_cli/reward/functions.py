"""Functions of the user's own, by import path or by file: rewards and scorers."""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from dirl_cli.errors import DirlError, did_you_mean


def is_import_path(name: str) -> bool:
    """Whether a name is that of a function of the user's own: `my_module.my_function` or `file.py:my_function`."""
    return "." in name or ":" in name


def find_function(name: str, what: str) -> Callable[..., Any]:
    """The function of that import path, or in that file. what: the word for it in a sentence.

    Raises DirlError where there is none, or where its code cannot be loaded.
    """
    path, is_file, own_name = name.rpartition(":")
    if not is_file:
        path, _, own_name = name.rpartition(".")
    try:
        module = load_file(Path(path).expanduser().resolve()) if is_file else import_module(path)
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise DirlError(f"the {what} {name} cannot be loaded ({error}): check its path or its code") from error
    except Exception as error:  # the code is the user's, and may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} in {frame.filename} line {frame.lineno}"
        raise DirlError(f"the {what} {name} cannot be loaded ({reason}): check its path or its code") from error

    function = getattr(module, own_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise DirlError(f"{path} has no function {own_name}: {did_you_mean(own_name, functions)}")
    return function


def source_digest(name: str) -> str:
    """A digest of the file that holds a function which was found; of Python's version where Python itself does."""
    path, is_file, _ = name.rpartition(":")
    file = path if is_file else getattr(sys.modules[name.rpartition(".")[0]], "__file__", None)
    source = Path(file).expanduser().read_bytes() if file else sys.version.encode()
    return hashlib.sha256(source).hexdigest()


class UncachedLoader(SourceFileLoader):
    """Compiles a file whenever it is loaded: Python's cache takes one of the same size and second to be unchanged."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_file(path: Path) -> ModuleType:
    """A Python file as a module; registered, since dataclasses and pickle look their module up by name."""
    name = f"reward file {path}"
    spec = spec_from_file_location(name, path, loader=UncachedLoader(name, str(path)))
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
