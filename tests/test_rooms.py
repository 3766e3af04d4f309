"""The rooms of the house: which modules may import which."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "dirl_cli"

# A room is a folder or a module at the top. Everyone may import these:
FREE = {"disk", "errors", "plain", "ranges", "screen", "types"}
MAY_IMPORT = {
    "cli": {"launch", "complete", "overrides"},  # when a command starts
    "launch": {"build", "commands", "explain", "overrides", "rundir", "schema", "tree", "worker"},
    "worker": {"commands", "rundir"},
    "complete": {"overrides", "tree"},
    "explain": {"schema", "tree"},
    "overrides": set(),
    "rundir": {"tree"},
    "tree": {"schema"},
    "schema": set(),
    "build": {"tree"},
    "commands": {
        "algo",
        "build",
        "data",
        "diffusion",
        "evaluation",
        "hub",
        "models",
        "loop",
        "reward",
        "rollout",
        "training",
    },
    "loop": {"algo", "data", "diffusion", "evaluation", "models", "reward", "rollout", "training"},
    "training": {"diffusion", "models"},
    "rollout": {"diffusion", "hub", "models"},
    "algo": {"diffusion"},
    "reward": set(),
    "evaluation": {"reward"},
    "data": {"hub", "reward"},  # of rewards only how a reference is read
    "hub": {"tree"},
    "models": {"diffusion", "hub"},
    "diffusion": set(),
    "api": {"build", "models", "rollout", "rundir", "training"},
    "disk": set(),
    "errors": set(),
    "plain": set(),
    "ranges": set(),
    "screen": set(),
    "types": set(),
    "__init__": {"api"},
}
ALSO = {("models/tiny.py", "data")}  # the embedded tokenizer is trained on the texts of the embedded data

MUST_NOT_IMPORT = {
    "cli": {"accelerate", "hydra", "omegaconf", "torch", "transformers"},
    "launch": {"torch", "transformers", "typer"},
    "complete": {"accelerate", "torch", "transformers", "typer"},
    "schema": {"torch", "transformers", "typer"},
    "build": {"torch", "transformers", "typer"},
    "rundir": {"torch", "transformers", "typer"},
    "commands": {"hydra", "typer"},
    "loop": {"hydra", "omegaconf", "typer"},
    "training": {"hydra", "omegaconf", "typer"},
    "rollout": {"accelerate", "hydra", "omegaconf", "typer"},
    "algo": {"accelerate", "hydra", "omegaconf", "transformers", "typer"},
    "reward": {"hydra", "omegaconf", "torch", "transformers", "typer"},
    "evaluation": {"hydra", "omegaconf", "torch", "typer"},
    "data": {"accelerate", "hydra", "omegaconf", "torch", "typer"},
    "hub": {"hydra", "omegaconf", "torch", "transformers", "typer"},
    "models": {"accelerate", "hydra", "omegaconf", "typer"},
    "diffusion": {"accelerate", "hydra", "omegaconf", "tokenizers", "transformers", "typer"},
    "types": {"hydra", "omegaconf", "torch"},
}


def modules():
    """Each module's path inside the package, its room, and all that it imports anywhere in its code."""
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE)
        yield path.as_posix(), path.parts[0].removesuffix(".py"), set(imports(ast.parse(file.read_text())))


def imports(module):
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_imports_only_what_it_may():
    for path, room, imported in modules():
        ours = {name.split(".")[1] for name in imported if name.startswith("dirl_cli.")}
        allowed = MAY_IMPORT[room] | FREE | {room} | {other for name, other in ALSO if name == path}
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"


def test_every_room_is_ignorant_of_what_it_must_not_know():
    for path, room, imported in modules():
        known = {name.split(".")[0] for name in imported} & MUST_NOT_IMPORT.get(room, set())
        assert not known, f"{path} imports {sorted(known)}"


def test_only_commands_and_what_starts_them_read_the_config():
    readers = {path for path, _, imported in modules() if any(name.startswith("omegaconf") for name in imported)}
    starters = {
        f"{name}.py" for name in ("build", "complete", "explain", "launch", "rundir", "schema", "tree", "worker")
    }
    assert {path for path in readers if not path.startswith("commands/")} <= starters
