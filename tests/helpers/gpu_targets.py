"""Triton kernels compiled for GPUs that are not here, in a process of its own, since a test's interprets them."""

import os
import subprocess
import sys

COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, types, num_warps, **constants):
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    return triton.compile(ASTSource(kernel, signature, places), target=target, options={"num_warps": num_warps})
"""


def compile_for(architecture: str, script: str) -> None:
    """Run a script that asks `compiled` for kernels. architecture: such as 90, of compute capability 9.0."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(place for place in sys.path if place)
    subprocess.run([sys.executable, "-c", COMPILED + script, architecture], check=True, env=environment)
