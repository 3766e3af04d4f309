"""Look at this machine and judge it, check by check, and show what came of it."""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from huggingface_hub import constants
from rich.text import Text

from dirl_cli.console import PlainConsole, working
from dirl_cli.distributed import cores
from dirl_cli.doctor import checks, machine
from dirl_cli.doctor.checks import Check, name_of
from dirl_cli.doctor.imports import Imported, import_all
from dirl_cli.doctor.requirements import (
    TORCH_COMPANIONS,
    Requirements,
    checkout_directory,
    installed_versions,
    read_requirements,
    torch_wanted_by,
)
from dirl_cli.files import installed
from dirl_cli.overview.find import RUNS, find_runs
from dirl_cli.overview.locks import lock_holder
from dirl_cli.text import counted

HUB_PATIENCE = 3.0  # seconds, while torch is imported anyway
TRIED = ("lmdeploy", "bitsandbytes")  # made for one torch or one CUDA: versions tell too little
STYLES = {"ok": "green", "absent": "dim", "partly": "yellow", "broken": "bold red"}
LABELS = 7 + 2  # letters before a check's name


def examine() -> tuple[list[Check], list[Check]]:
    """The checks of what all commands need, and those of the extras."""
    hub = machine.asking_hub(HUB_PATIENCE)
    requirements = read_requirements(checkout_directory())
    versions = installed_versions(requirements)
    for lines in checks.WITHOUT_DEPENDENCIES.values():
        versions |= {name: installed(name) for name in map(name_of, lines)}
    driver = machine.read_driver()
    on_bus = machine.gpus_on_bus()
    has_gpu = bool(on_bus or (driver and driver.gpus))
    with working(PlainConsole(stderr=True), "importing torch"):
        imported = import_all(packages_to_import(versions, has_gpu))

    always = map(name_of, requirements.always)
    torch = imported.get("torch", Imported())
    environment = os.environ
    needed = [
        Check("dirl", "ok", own_version()),
        checks.check_python(platform.python_version(), requirements.python),
        checks.check_packages(requirements.always, versions, torch_wanted_by([*always, *TORCH_COMPANIONS])),
        checks.check_torch(versions["torch"], torch),
        checks.check_gpu(
            on_bus, driver, torch.facts.get("cuda"), imported.get("cuda"), environment.get("CUDA_VISIBLE_DEVICES")
        ),
    ]
    if needed[-1].state == "ok" and "triton" in imported:
        needed.append(checks.check_triton(imported["triton"], has_compiler()))
    needed += [
        checks.check_cores(
            cores(), machine.core_quota(), environment.get("OMP_NUM_THREADS"), torch.facts.get("threads")
        ),
        checks.check_memory(*machine.memory()),
        *disk_checks(),
        checks.check_hub(hub(), machine.cached_repositories()),
        checks.check_runs({run: lock_holder(run / "lock") for run in find_runs(RUNS)}),
    ]
    return needed, extra_checks(requirements, versions, imported, has_gpu)


def packages_to_import(versions: dict[str, str | None], has_gpu: bool) -> list[str]:
    """What is worth an import: only a GPU makes more than torch worth its time."""
    if versions["torch"] is None:
        return []
    if not has_gpu:
        return ["torch"]
    return ["torch", "cuda", "triton", *(name for name in TRIED if versions.get(name))]


def own_version() -> str:
    version = installed("dirl")
    if (checkout_directory() / "pyproject.toml").is_file():
        return f"{version or 'not installed'}, the checkout in {checkout_directory()}"
    return f"{version}"


def has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


def disk_checks() -> list[Check]:
    """Of the disks that the runs and the Hub's cache are on."""
    runs = machine.disk_of(RUNS.absolute())
    cache = machine.disk_of(Path(constants.HF_HUB_CACHE))
    return [
        checks.check_disk("disk", runs, "begin in another directory"),
        checks.check_disk("cache", cache, "export HF_HOME=DIR on another disk"),
    ]


def extra_checks(
    requirements: Requirements, versions: dict[str, str | None], imported: dict[str, Imported], has_gpu: bool
) -> list[Check]:
    results = []
    for name in checks.EXTRAS:
        lines = requirements.extras.get(name)
        if lines:
            packages = [name_of(line) for line in lines]
            errors = [imported[package].error for package in packages if package in imported]
            wanted = torch_wanted_by(packages)
            results.append(checks.check_extra(name, lines, versions, wanted, "; ".join(filter(None, errors)), has_gpu))
    return results


def show(needed: Sequence[Check], extras: Sequence[Check], console: PlainConsole) -> None:
    """Print what the checks came to, a line each where this is no terminal."""
    for check in needed:
        show_check(check, console)
    console.print("\nOptional:", soft_wrap=True)
    ready = [check.name for check in extras if check.state == "ok"]
    if ready:
        show_check(Check("installed", "ok", ", ".join(ready)), console)
    for check in extras:
        if check.state != "ok":
            show_check(check, console)

    broken = [check.name for check in (*needed, *extras) if check.state == "broken"]
    if broken:
        console.print(f"\n{counted(len(broken), 'thing')} to mend: {', '.join(broken)}", soft_wrap=True)
    else:
        console.print("\nNothing to mend.", soft_wrap=True)


def show_check(check: Check, console: PlainConsole) -> None:
    """Print a check: in a terminal in lines as wide as that, elsewhere in one, and its remedy in another."""
    margin = LABELS + 12
    width = console.width if console.is_terminal else sys.maxsize
    text = check.finding
    if check.state == "absent" and check.remedy:
        text += f": {check.remedy}"
    lines = wrap(text, max(20, width - margin), break_long_words=False, break_on_hyphens=False) or [""]
    console.print(
        Text.assemble((f"{check.state:<{LABELS}}", STYLES[check.state]), f"{check.name:<12}", lines[0]), soft_wrap=True
    )
    for line in lines[1:]:
        console.print(" " * margin + line, soft_wrap=True)
    # A command is not broken into lines, so that it can be copied: the terminal itself wraps what is too long.
    if check.remedy and check.state != "absent":
        console.print(f"{'':{margin}}→ {check.remedy}", soft_wrap=True, style="bold" if check.state == "broken" else "")


def is_sound(results: Sequence[Check]) -> bool:
    """Whether nothing is broken."""
    return not any(check.state == "broken" for check in results)
