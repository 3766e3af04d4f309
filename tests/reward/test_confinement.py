import ctypes
import struct

import pytest

from dirl_cli.reward import confinement
from tests.reference.system_calls import CALLS, STATUSES

MACHINES = ["aarch64", "x86_64"]
AUDIT_ARCH = {"aarch64": 183 | 0xC0000000, "x86_64": 62 | 0xC0000000}  # the ELF machine, 64 bits, little-endian
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO | EPERM, _KILL_PROCESS
FOR_32_BITS = 0x40000000  # that bit of a call's number: the same calls of x86-64 with short pointers


@pytest.mark.parametrize("machine", MACHINES)
def test_each_call_has_the_number_of_the_kernels_header(machine):
    header = CALLS[machine]
    numbers = confinement.CALLS[machine]
    assert {name: header.index(name) for name in numbers} == numbers
    assert len(header) == {"aarch64": 295, "x86_64": 335}[machine]  # the last are kexec_file_load and rseq


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_allows_a_computations_calls_and_refuses_all_others(machine):
    program = confinement.filter_instructions(machine)
    for number in range(600):
        name = CALLS[machine][number] if number < len(CALLS[machine]) else "newer"
        verdict = ALLOW if name in confinement.CALLS[machine] else REFUSE
        assert filtered(program, number, AUDIT_ARCH[machine]) == verdict, name
        assert filtered(program, number | FOR_32_BITS, AUDIT_ARCH[machine]) == REFUSE
        assert filtered(program, number, 0x40000003) == KILL  # a call of i386, whose numbers are others


@pytest.mark.parametrize("machine", MACHINES)
def test_no_call_that_is_allowed_reaches_files_programs_or_other_processes(machine):
    harmful = {"open", "openat", "openat2", "creat", "stat", "fstatat", "newfstatat", "statx", "ioctl", "fcntl", "dup"}
    harmful |= {"execve", "execveat", "fork", "vfork", "clone", "clone3", "kill", "tkill", "tgkill", "ptrace", "prctl"}
    harmful |= {"socket", "socketpair", "connect", "sendmsg", "recvmsg", "pipe", "pipe2", "memfd_create", "prlimit64"}
    harmful |= {"process_vm_readv", "process_vm_writev", "io_uring_setup", "io_setup", "bpf", "seccomp", "setrlimit"}
    assert not harmful & confinement.CALLS[machine].keys()


@pytest.mark.parametrize("machine", MACHINES)
def test_the_status_of_a_file_is_read_where_the_kernel_writes_it(machine):
    status = STATUSES[machine]()
    status.st_dev, status.st_ino, status.st_mode, status.st_nlink = 2**40 + 1, 2**50 + 2, 0o100644, 3
    status.st_uid, status.st_gid, status.st_rdev, status.st_size = 4, 2**32 - 5, 2**41 + 6, 2**60 + 7
    status.st_blksize, status.st_blocks = 4096, 2**33 + 8
    status.st_atime, status.st_mtime, status.st_ctime = -9, 10, 2**34
    status.st_atime_nsec, status.st_mtime_nsec, status.st_ctime_nsec = 11, 12, 999_999_999
    assert ctypes.sizeof(status) == {"aarch64": 128, "x86_64": 144}[machine] <= confinement.STATUS_BYTES

    seen = confinement.read_status(bytes(status), machine)
    for name in ("dev", "ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks"):
        assert getattr(seen, f"st_{name}") == getattr(status, f"st_{name}"), name
    assert (seen.st_atime_ns, seen.st_mtime_ns) == (-8_999_999_989, 10_000_000_012)
    assert seen.st_ctime_ns == 2**34 * 10**9 + 999_999_999


def filtered(program: bytes, number: int, architecture: int) -> int:
    """What a filter of sock_filters returns of a call, as linux/bpf_common.h says what each does."""
    instructions = list(struct.iter_unpack("HBBI", program))
    data = struct.pack("II", number, architecture)  # the first fields of struct seccomp_data
    accumulator = at = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            [accumulator] = struct.unpack_from("I", data, value)
        elif code == 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
            at += if_true if accumulator == value else if_false
        elif code == 0x06:  # BPF_RET | BPF_K
            return value
        else:
            raise ValueError(hex(code))
