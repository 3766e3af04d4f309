"""What a process may still do that runs the code of others: compute, and read and write what it was handed.

The kernel refuses everything else (seccomp): no file, program, process, thread, socket or signal can be had. Linux on
x86-64 and aarch64 alone.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from functools import cache

MEMORY = 2**30  # bytes of address space
OUTPUT = 16 * 2**20  # bytes of a file that was handed to it

# The numbers of system calls that a computation needs. None takes a path, makes a process or a thread, or reaches
# another process.
CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19,
        "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39,
        "exit": 60, "uname": 63, "getcwd": 79, "gettimeofday": 96, "getrusage": 98, "times": 100, "getuid": 102,
        "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201,
        "futex": 202, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "pselect6": 270, "ppoll": 271, "getrandom": 318,
    },
    "aarch64": {
        "getcwd": 17, "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
        "pselect6": 72, "ppoll": 73, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
        "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_yield": 124,
        "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "times": 153, "uname": 160, "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173,
        "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215,
        "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
    },
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel numbers them

# The kernel's struct stat: its fields in order, and how they are laid out.
TIMES = "atime atime_rest mtime mtime_rest ctime ctime_rest"  # seconds, and nanoseconds
STATUS = {
    "x86_64": (f"dev ino nlink mode uid gid rdev size blksize blocks {TIMES}", "=QQQ3I4xQ9q"),
    "aarch64": (f"dev ino mode nlink uid gid rdev size blksize blocks {TIMES}", "=QQ4IQ8xqi4x7q"),
}
STATUS_BYTES = 144  # of the longer one

# From linux/filter.h, linux/seccomp.h and linux/prctl.h.
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: the call fails with EPERM
NUMBER, ARCHITECTURE = 0, 4  # bytes into seccomp_data
SET_PARENT_DEATH_SIGNAL, GET_SECCOMP, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 21, 22, 38
FILTER = 2


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def can_confine() -> bool:
    """Whether this machine's kernel can confine a process as it is done here."""
    # 0 and 2: not confined yet, or by a filter that a container put around it, which another may narrow.
    return sys.platform == "linux" and platform.machine() in CALLS and prctl(GET_SECCOMP) in (0, FILTER)


def confine(seconds: float) -> None:
    """Give up everything but computing, for good; the process is killed after so many seconds of computing.

    Raises OSError where the kernel does not do it.
    """
    # The limits first: afterwards nothing can change them.
    computing = int(seconds) + 2
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: OUTPUT,
        resource.RLIMIT_CPU: computing,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing too much raises in its place

    require_success(prctl(SET_NO_NEW_PRIVILEGES, 1))
    instructions = filter_instructions(platform.machine())
    program = FilterProgram(len(instructions) // 8, instructions)
    require_success(prctl(SET_SECCOMP, FILTER, ctypes.addressof(program)))


@cache
def filter_instructions(machine: str) -> bytes:
    """The filter that allows the calls of a computation, as the kernel's struct sock_filter, one after another."""
    lines = [
        instruction(LOAD, ARCHITECTURE),
        instruction(JUMP_IF_EQUAL, ARCHITECTURES[machine], if_true=1),
        instruction(RETURN, KILL),
        instruction(LOAD, NUMBER),
    ]
    for number in CALLS[machine].values():
        lines += [instruction(JUMP_IF_EQUAL, number, if_false=1), instruction(RETURN, ALLOW)]
    return b"".join([*lines, instruction(RETURN, REFUSE)])


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """A struct sock_filter. if_true, if_false: instructions to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def descriptor_status(fd: int) -> os.stat_result:
    """What `os.fstat` tells, for a process that is confined.

    The C library's own `fstat` uses a call that takes a path too, which is refused.
    """
    machine = platform.machine()
    buffer = ctypes.create_string_buffer(STATUS_BYTES)
    require_success(C_LIBRARY.syscall(CALLS[machine]["fstat"], fd, buffer))
    return read_status(buffer.raw, machine)


def read_status(status: bytes, machine: str) -> os.stat_result:
    """The kernel's struct stat on that machine as Python has it."""
    names, layout = STATUS[machine]
    of = dict(zip(names.split(), struct.unpack_from(layout, status), strict=True))
    nanoseconds = [of[name] * 10**9 + of[f"{name}_rest"] for name in ("atime", "mtime", "ctime")]
    fields = [of[name] for name in ("mode", "ino", "dev", "nlink", "uid", "gid", "size", "atime", "mtime", "ctime")]
    fields += [time / 10**9 for time in nanoseconds] + nanoseconds
    return os.stat_result((*fields, of["blksize"], of["blocks"], of["rdev"]))


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, which may have happened already."""
    require_success(prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def prctl(option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = C_LIBRARY.prctl(option, *padded)
    return result


def require_success(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


C_LIBRARY = ctypes.CDLL(None, use_errno=True)
