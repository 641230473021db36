"""What the operating system keeps sandboxed code from, in two steps.

`enter_namespaces` is called once by a zygote (strong level only); `confine` by each child that it forks, just before
untrusted code runs. Standard library only: this runs in the sandboxed interpreter.
"""

import ctypes
import os
import resource
import signal
import socket
import struct
from typing import Final

from mua_rl.rewards.sandbox import seccomp

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
_MNT_DETACH: Final = 2
_LANDLOCK_READ: Final = 1 << 2 | 1 << 3  # read files, list folders
_SYS_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}

_FIRST_HOST_ID: Final = 1_879_048_192
"""Far above the ids of accounts and of `/etc/subuid`; each zygote takes the pair that its process id selects."""

libc = ctypes.CDLL(None, use_errno=True)

# Made here, in the zygote, since every child would have to make them anew.
_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()
_READING_CAPABILITIES: Final = (1 << 2, 1 << 1)  # CAP_DAC_READ_SEARCH; CAP_DAC_OVERRIDE, which is all that Docker gives
libc.capset, libc.prctl, libc.unshare, libc.setns  # noqa: B018  (looked up on first use)


class Unavailable(Exception):
    """A protection cannot be had here; the message names it and what would help."""


def _call(name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Linux `unshare`, which Python has from 3.12 on."""
    _call("unshare", flags)


def set_namespace(fd: int, kind: int) -> None:
    """Linux `setns`."""
    _call("setns", fd, kind)


def die_with_parent() -> None:
    """Have the kernel send SIGKILL when the thread that forked this process ends."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """Close /proc/PID/mem, environ and the like of this process, and ptrace, to others of the same user."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def enter_namespaces(readable: list[str]) -> bool:
    """Own user, mount, pid, network, ipc and uts namespaces, over a read-only root that holds just `readable`.

    The pid namespace starts with the next child. The caller must be single-threaded.

    Args:
        readable: Folders to keep, read-only, at their own paths.

    Returns:
        Whether a second user id is at hand for the children (root only; an ordinary user can map just its own).

    Raises:
        Unavailable: Something cannot be had.
    """
    is_root = os.geteuid() == 0
    if is_root:
        os.setgroups([])
        ready, write_maps = _fork_id_mapper(os.getpid(), unused_host_id())
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    except OSError as error:
        raise Unavailable(
            f"this process may not make namespaces ({error}). In a container: run it with --privileged, or with "
            "--cap-add SYS_ADMIN and a seccomp profile that allows unshare; on a host: set sysctl "
            "kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0, "
            "and user.max_user_namespaces above 0"
        ) from error
    if is_root:
        os.write(ready, b"x")
        os.close(ready)
        _, status = os.waitpid(write_maps, 0)
        if status:
            raise Unavailable("root without CAP_SETUID and CAP_SETGID cannot give sandboxes a user id of their own")
    else:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    # Sources are opened while this is still the user who may reach them (an interpreter under /root, mode 0700).
    sources = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in readable}
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    try:
        _make_root(sources)
    except OSError as error:
        raise Unavailable(f"no file system of its own ({error}); mounts inside user namespaces are needed") from error
    return is_root


def unused_host_id() -> int:
    """First of two consecutive user ids that no account has, inside what this process's user namespace maps."""
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        extents = [tuple(map(int, line.split())) for line in file]
    first, _, count = max(extents, key=lambda extent: extent[2])
    offset = os.getpid() * 2
    if first <= _FIRST_HOST_ID and _FIRST_HOST_ID + offset + 2 < first + count:
        return _FIRST_HOST_ID + offset
    return first + count - 2 - offset % max(2, count // 4)


def _fork_id_mapper(pid: int, host_id: int) -> tuple[int, int]:
    """A child, still outside, that maps ids 0 and 1 of `pid`'s new namespace to `host_id` and the next, when told."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(read_end)
        return write_end, child
    code = 1
    try:
        os.close(write_end)
        if os.read(read_end, 1):
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{pid}/{name}", f"0 {host_id} 2")
            code = 0
    finally:
        os._exit(code)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _call("mount", *encoded, ctypes.c_ulong(flags), None if options is None else options.encode())


def _make_root(sources: dict[str, int]) -> None:
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    # Mounted over any folder, in this mount namespace only; the sources are held open, so hiding them does not matter.
    base = "/tmp"
    _mount("sandbox", base, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=1m,nr_inodes=1k,mode=0755")
    for path, fd in sources.items():
        target = base + path
        os.makedirs(target, mode=0o755, exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", target, None, _MS_BIND | _MS_REC)
        kept = os.statvfs(target).f_flag & (_MS_NOEXEC | 1024 | 2048)  # a user namespace may not clear these
        _mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept)
        for packages in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{target}/{packages}") and not any(p.startswith(f"{path}/{packages}") for p in sources):
                _mount("empty", f"{target}/{packages}", "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k")
        os.close(fd)
    _mount(None, base, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(base)
    pivot_root = _SYS_PIVOT_ROOT[os.uname().machine]
    if libc.syscall(pivot_root, b".", b"."):
        raise OSError(ctypes.get_errno(), "pivot_root")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def inspect_namespaces(readable: list[str]) -> list[str]:
    """The strong level's promises that do not hold in this process, as seen before any seccomp filter hides them."""
    faults = []
    if os.getpid() != 1 or os.getppid() != 0:
        faults.append("no pid namespace of its own")
    expected = {path.split("/")[1] for path in readable}
    if set(os.listdir("/")) != expected:
        faults.append(f"the root folder holds {sorted(set(os.listdir('/')) - expected)}")
    for folder in ["/", *readable]:
        try:
            os.close(os.open(f"{folder}/.mua_probe", os.O_WRONLY | os.O_CREAT, 0o600))
            faults.append(f"{folder} can be written")
        except OSError:
            pass
    if [name for _, name in socket.if_nameindex() if name != "lo"]:
        faults.append("the network is there")
    return faults


def confine_reads(readable: list[str]) -> bool:
    """With Landlock, let this process and its children open nothing but what `readable` folders hold, for reading.

    Sets no_new_privs. Also keeps them from tracing and from the memory of processes outside.

    Returns:
        Whether the kernel has Landlock (5.13 or later, and switched on).
    """
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    everything = struct.pack("=Q", 0x1FFF)  # the access rights of Landlock's first version
    ruleset = libc.syscall(444, everything, len(everything), 0)
    if ruleset < 0:
        return False
    for folder in readable:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        if libc.syscall(445, ruleset, 1, struct.pack("=Qi", _LANDLOCK_READ, fd), 0):  # LANDLOCK_RULE_PATH_BENEATH
            raise OSError(ctypes.get_errno(), "landlock_add_rule")
        os.close(fd)
    if libc.syscall(446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)
    return True


def drop_privileges(second_id: bool) -> None:
    """Give up every capability and, if there is one, take the second user id."""
    if second_id:
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    _call("capset", _CAPABILITY_HEADER, _NO_CAPABILITIES)


def set_limits(memory_bytes: int, threads: int | None) -> None:
    """Resource limits, hard and soft, for this process and its children; no limit on threads if that is None."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: min(memory_bytes, 64 << 20),
    }
    if threads is not None:
        limits[resource.RLIMIT_NPROC] = threads
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def limit_cpu_time(seconds: int) -> None:
    """Have the kernel end this process after so much processor time, should the trainer be unable to."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def forbid_system_calls(program: seccomp.Program) -> None:
    """no_new_privs and the seccomp filter: the last step, nothing more can be set up after it."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    seccomp.load_filter(libc, program)


def reading_capability() -> int:
    """The least that this process has of what lets it read other users' files, as a capability's bit; 0 for nothing."""
    held = (ctypes.c_uint32 * 6)()
    _call("capget", _CAPABILITY_HEADER, held)
    return next((bit for bit in _READING_CAPABILITIES if held[1] & bit), 0)


def drop_to(host_id: int | None, capability: int = 0) -> None:
    """Without namespaces: as root, become the user `host_id`.

    Args:
        host_id: Nobody's id, or `None` for one who is not root.
        capability: The one to keep (`reading_capability`), where `host_id` may not read the interpreter. Then
            `confine_reads` must hold: it alone says which files can be opened.
    """
    if host_id is None:
        return
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(host_id, host_id, host_id)
    os.setresuid(host_id, host_id, host_id)
    _call("capset", _CAPABILITY_HEADER, (ctypes.c_uint32 * 6)(capability, capability))
