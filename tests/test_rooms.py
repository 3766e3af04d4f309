"""The rooms of the house: which modules may import which."""

import ast

from tests.helpers.paths import ROOT

SOURCE = ROOT / "src" / "dirl_cli"

# A room is a folder, a module at the top, or a module of `cli`, where who knows whom decides how fast help is.
# Everyone may import these:
FREE = {"console", "distributed", "errors", "files", "line_files", "ranges", "text", "types"}
MAY_IMPORT = {
    "cli/app": {"cli/launch", "cli/complete", "cli/overrides", "cli/runs", "doctor"},  # when a command starts
    "cli/launch": {
        "cli/build",
        "cli/config_tree",
        "cli/explain",
        "cli/former",
        "cli/group_help",
        "cli/gym_choices",
        "cli/overrides",
        "cli/processes",
        "cli/run_dir",
        "cli/schema",
        "commands",
    },
    "cli/processes": {"cli/worker"},
    "cli/runs": {"cli/departures", "overview"},
    "cli/departures": {"cli/complete", "cli/config_tree", "cli/former", "cli/run_dir"},
    "cli/worker": {"cli/run_dir", "commands"},
    "cli/complete": {"cli/config_tree", "cli/overrides"},
    "cli/explain": {"cli/config_tree", "cli/schema"},
    "cli/group_help": {"cli/config_tree"},
    "cli/former": set(),
    "cli/gym_choices": {"cli/build"},
    "cli/overrides": set(),
    "cli/run_dir": {"cli/config_tree", "cli/former"},
    "cli/config_tree": {"cli/schema"},
    "cli/schema": set(),
    "cli/build": {"cli/config_tree", "cli/former"},
    "cli/__init__": set(),
    "commands": {
        "cli/build",
        "data",
        "diffusion",
        "dpo",
        "evaluation",
        "harness",
        "hub",
        "models",
        "plan",
        "report",
        "reward",
        "rl",
        "rollout",
        "serving",
        "sft",
        "training",
        "viewer",
    },
    "plan": {"data", "diffusion", "dpo", "models", "rl", "rollout", "sft", "training"},
    "rl": {"data", "diffusion", "evaluation", "models", "report", "reward", "rollout", "training"},
    "sft": {"data", "diffusion", "evaluation", "models", "report", "reward", "rollout", "training"},
    "dpo": {"data", "diffusion", "models", "rl", "rollout", "sft", "training"},
    "evaluation": {"data", "models", "report", "reward", "rollout"},
    "training": {"data", "diffusion", "models", "report"},
    "rollout": {"diffusion", "hub", "models"},
    "reward": set(),
    "data": {"hub", "reward"},  # of rewards only how a reference is read
    "hub": set(),
    "models": {"diffusion", "hub"},
    "diffusion": set(),
    "doctor": {"overview"},
    "overview": {"report"},
    "report": set(),
    "serving": {"data", "diffusion", "models", "rollout"},
    "viewer": {"evaluation", "rollout", "sft"},
    "harness": {"api", "data", "models", "rollout", "training"},
    "api": {"cli/build", "cli/run_dir", "models", "rollout", "training"},
    **{name: set() for name in FREE},
    "__init__": {"api"},
}
ALSO = {("models/tiny.py", "data")}  # the embedded tokenizer is trained on the texts of the embedded data

MUST_NOT_IMPORT = {
    "cli/app": {"accelerate", "hydra", "omegaconf", "torch", "transformers"},
    "cli/runs": {"accelerate", "hydra", "omegaconf", "torch", "transformers"},
    "cli/launch": {"torch", "transformers", "typer"},
    "cli/processes": {"torch", "transformers", "typer"},
    "cli/complete": {"accelerate", "torch", "transformers", "typer"},
    "cli/schema": {"torch", "transformers", "typer"},
    "cli/build": {"torch", "transformers", "typer"},
    "cli/run_dir": {"torch", "transformers", "typer"},
    "commands": {"hydra", "typer"},
    "training": {"hydra", "omegaconf", "typer"},
    "rollout": {"accelerate", "hydra", "omegaconf", "typer"},
    "rl": {"hydra", "omegaconf", "typer"},
    "sft": {"hydra", "omegaconf", "typer"},
    "dpo": {"hydra", "omegaconf", "typer"},
    "plan": {"hydra", "omegaconf", "typer"},
    "doctor": {"hydra", "omegaconf", "torch", "transformers", "typer"},
    "overview": {"hydra", "omegaconf", "torch", "transformers", "typer"},
    "report": {"hydra", "omegaconf", "transformers", "typer"},
    "reward": {"hydra", "omegaconf", "torch", "transformers", "typer"},
    "evaluation": {"hydra", "omegaconf", "typer"},
    "data": {"accelerate", "hydra", "omegaconf", "typer"},
    "serving": {"hydra", "omegaconf", "typer"},
    "viewer": {"hydra", "omegaconf", "typer"},
    "harness": {"hydra", "omegaconf", "typer"},
    "hub": {"hydra", "omegaconf", "torch", "transformers", "typer"},
    "models": {"accelerate", "hydra", "omegaconf", "typer"},
    "diffusion": {"accelerate", "hydra", "omegaconf", "tokenizers", "transformers", "typer"},
    "types": {"hydra", "omegaconf", "torch"},
}


def modules():
    """Each module's path inside the package, its room, and all that it imports anywhere in its code."""
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE)
        yield path.as_posix(), room_of(path.with_suffix("").parts), set(imports(ast.parse(file.read_text())))


def room_of(parts):
    return "/".join(parts[:2]) if parts[0] == "cli" else parts[0]


def imports(module):
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_imports_only_what_it_may():
    for path, room, imported in modules():
        ours = {room_of(name.split(".")[1:]) for name in imported if name.startswith("dirl_cli.")}
        allowed = MAY_IMPORT[room] | FREE | {room} | {other for name, other in ALSO if name == path}
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"


def test_every_room_is_ignorant_of_what_it_must_not_know():
    for path, room, imported in modules():
        known = {name.split(".")[0] for name in imported} & MUST_NOT_IMPORT.get(room, set())
        assert not known, f"{path} imports {sorted(known)}"


def test_only_commands_and_what_starts_them_read_the_config():
    readers = {path for path, _, imported in modules() if any(name.startswith("omegaconf") for name in imported)}
    assert {path.partition("/")[0] for path in readers} <= {"cli", "commands"}
