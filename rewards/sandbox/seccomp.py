"""The system calls that sandboxed code may make: a classic BPF program, built here, loaded with `prctl`.

An allow list; everything else fails with EPERM. What it leaves out on purpose: new processes and programs (`clone`
without CLONE_THREAD, `fork`, `execve`), any socket but a connected stream pair, opening for writing, changing the
file system, locks and leases on files, signals to others (those too that the kernel sends for a process, as `fcntl`'s
F_SETOWN, `timer_create`, `mq_notify` and `prctl` have it do), tracing, namespaces, keys, io_uring, and memory that
RLIMIT_AS does not count (`memfd_create`, System V shared memory, larger pipes). Single-threaded code, threads, timers,
asyncio and reading files work.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable
from typing import Final

_LOAD, _JUMP_EQ, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06  # opcodes of linux/filter.h
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_*
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16  # struct seccomp_data

_CLONE_THREAD: Final = 0x00010000
_CLONE_NEW: Final = 0x7E020000  # every CLONE_NEW* flag
_OPEN_FOR_WRITING: Final = 0o3 | 0o100 | 0o1000 | 0o20000000  # access mode, O_CREAT, O_TRUNC, __O_TMPFILE
_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, window size, FIONREAD, FIONBIO, FIO(N)CLEX
_FCNTLS: Final = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETFL by its argument
_SETFL, _O_ASYNC = 4, 0o20000  # the same on both architectures, as those above

# Numbers of arch/x86/entry/syscalls/syscall_64.tbl and of include/uapi/asm-generic/unistd.h.
_ALLOWED_X86_64: Final = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51,
    "getpeername": 52, "getsockopt": 55, "exit": 60, "wait4": 61, "uname": 63, "getcwd": 79,
    "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
    "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115, "getresuid": 118,
    "getresgid": 120, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
    "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "waitid": 247, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getcpu": 309, "getrandom": 318, "membarrier": 324, "statx": 332,
    "rseq": 334, "close_range": 436, "faccessat2": 439, "epoll_pwait2": 441,
}  # fmt: skip
_ALLOWED_AARCH64: Final = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24,
    "faccessat": 48, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64,
    "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
    "fstat": 80, "exit": 93, "exit_group": 94, "waitid": 95, "set_tid_address": 96, "futex": 98, "set_robust_list": 99,
    "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113, "clock_getres": 114,
    "clock_nanosleep": 115, "restart_syscall": 128, "sched_getaffinity": 123, "sched_yield": 124, "sigaltstack": 132,
    "rt_sigsuspend": 133, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigpending": 136, "rt_sigtimedwait": 137,
    "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150, "times": 153, "getgroups": 158, "uname": 160,
    "getrlimit": 163, "getrusage": 165, "getcpu": 168, "gettimeofday": 169, "getpid": 172, "getppid": 173,
    "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "getsockname": 204,
    "getpeername": 205, "sendto": 206, "recvfrom": 207, "getsockopt": 209, "shutdown": 210, "sendmsg": 211,
    "recvmsg": 212, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
    "wait4": 260, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "close_range": 436,
    "faccessat2": 439, "epoll_pwait2": 441,
}  # fmt: skip

# Calls that are allowed with some arguments only.
_CHECKED_X86_64: Final = {
    "open": 2, "openat": 257, "clone": 56, "clone3": 435, "fcntl": 72, "ioctl": 16, "socketpair": 53, "prlimit64": 302,
}  # fmt: skip
_CHECKED_AARCH64: Final = {
    "openat": 56, "clone": 220, "clone3": 435, "fcntl": 25, "ioctl": 29, "socketpair": 199, "prlimit64": 261,
}  # fmt: skip

_ARCHITECTURES: Final = {
    "x86_64": (0xC000003E, _ALLOWED_X86_64, _CHECKED_X86_64),
    "aarch64": (0xC00000B7, _ALLOWED_AARCH64, _CHECKED_AARCH64),
}


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def supported() -> bool:
    """Whether this machine's system-call numbers are known here."""
    return platform.machine() in _ARCHITECTURES


def build_filter() -> Program:
    """The BPF program for this machine."""
    arch, allowed, checked = _ARCHITECTURES[platform.machine()]
    program = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_JUMP_EQ, arch, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_OFFSET),
    ]
    program += _allow_if_among(allowed.values())
    for name, number in checked.items():
        body = _argument_check(name)
        program += [_instruction(_JUMP_EQ, number, 0, len(body)), *body]
    program.append(_deny(errno.EPERM))
    return Program(len(program), b"".join(program))


def _argument_check(name: str) -> list[bytes]:
    """Instructions that end in a verdict on one call, by the low half of its arguments."""
    if name == "clone3":  # its flags lie in memory, out of BPF's sight; on ENOSYS the C library falls back to clone
        return [_deny(errno.ENOSYS)]
    if name in ("open", "openat"):
        return [_load_argument((name == "openat" and 2) or 1), *_allow_if_clear(_OPEN_FOR_WRITING, errno.EACCES)]
    if name == "clone":
        return [
            _load_argument(0),
            _instruction(_JUMP_SET, _CLONE_THREAD, 1, 0),
            _deny(errno.EPERM),
            *_allow_if_clear(_CLONE_NEW, errno.EPERM),
        ]
    if name == "socketpair":  # a datagram pair could still send to any address
        return [
            _load_argument(0),
            _instruction(_JUMP_EQ, 1, 1, 0),  # AF_UNIX
            _deny(errno.EPERM),
            _load_argument(1),
            _instruction(_AND, 0xF),
            *_allow_if_equal(1),  # SOCK_STREAM
        ]
    if name == "prlimit64":  # its own limits only: they can be lowered, not raised
        return [_load_argument(0), *_allow_if_equal(0)]
    if name == "fcntl":
        set_flags = [_load_argument(2), *_allow_if_clear(_O_ASYNC, errno.EPERM)]
        return [
            _load_argument(1),
            *_allow_if_among(_FCNTLS),
            _instruction(_JUMP_EQ, _SETFL, 0, len(set_flags)),
            *set_flags,
            _deny(errno.EPERM),
        ]
    assert name == "ioctl"
    return [_load_argument(1), *_allow_if_among(_IOCTLS), _deny(errno.ENOTTY)]


def _allow_if_among(values: Iterable[int]) -> list[bytes]:
    pairs = ([_instruction(_JUMP_EQ, value, 0, 1), _instruction(_RETURN, _ALLOW)] for value in values)
    return [instruction for pair in pairs for instruction in pair]


def _allow_if_clear(mask: int, error: int) -> list[bytes]:
    return [_instruction(_JUMP_SET, mask, 1, 0), _instruction(_RETURN, _ALLOW), _deny(error)]


def _allow_if_equal(value: int) -> list[bytes]:
    return [*_allow_if_among([value]), _deny(errno.EPERM)]


def _load_argument(index: int) -> bytes:
    return _instruction(_LOAD, _ARGS_OFFSET + 8 * index)  # low half: both architectures are little-endian


def _deny(error: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | error)


def _instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def load_filter(libc: ctypes.CDLL, program: Program) -> None:
    """Confine this thread, and all it starts, to `program`, for good. Needs no_new_privs.

    Raises:
        OSError: The kernel refused.
    """
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
