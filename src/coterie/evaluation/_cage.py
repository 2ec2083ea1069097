"""What runs inside the sandbox's process before the code does: it locks the door behind itself. Standard library only.

    python -I -S _cage.py FOLDER MEMORY_BYTES CPU_SECONDS FILE_BYTES REPORT PROGRAM

Each lock that the kernel grants is reported on the file descriptor REPORT, one letter: n (no network: a network
namespace of its own), f (files: Landlock, only FOLDER is written and only it, Python and the system's libraries are
read); and "!" when PROGRAM has run to its last line, so that code which merely exits early is not taken for code that
passed.
"""

import contextlib
import ctypes
import os
import resource
import runpy
import socket
import sys

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, SIGKILL = 38, 1, 9
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same on all 64-bit machines
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
EVERY = (1 << 13) - 1  # all file rights of Landlock's first version


class _Attributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _no_network(libc: ctypes.CDLL) -> bool:
    """An empty network namespace, where the kernel lets this user have one."""
    return bool(libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0)


def _few_files(libc: ctypes.CDLL, folder: str) -> bool:
    """Landlock: everything else on the disk is out of reach, where the kernel has it (Linux 5.13)."""
    attributes = _Attributes(EVERY)
    ruleset = libc.syscall(LANDLOCK_CREATE, ctypes.byref(attributes), ctypes.sizeof(attributes), 0)
    if ruleset < 0:
        return False
    readable = ["/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix, "/dev/null", "/dev/urandom"]
    for path, rights in [*((p, READ) for p in readable), (folder, EVERY)]:
        with contextlib.suppress(OSError):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # A right to directories cannot be given on a file.
            rule = _PathBeneath(rights if os.path.isdir(path) else rights & 0b111, opened)
            libc.syscall(LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
            os.close(opened)
    return bool(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0)


def _deny_sockets() -> None:
    """For kernels that grant no namespace: refuse sockets from Python. Code that reaches C gets around this."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no network in the sandbox")

    def hook(event: str, _args: tuple[object, ...]) -> None:
        if event.startswith("socket."):
            raise PermissionError("no network in the sandbox")

    socket.socket = refuse  # type: ignore[assignment, misc]
    sys.addaudithook(hook)


def main() -> None:
    folder, program = sys.argv[1], sys.argv[6]
    memory, cpu, size, report = map(int, sys.argv[2:6])
    locks = ""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        locks += "n" if _no_network(libc) else ""
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        locks += "f" if _few_files(libc, folder) else ""
    if "n" not in locks:
        _deny_sockets()
    os.write(report, locks.encode() or b"-")
    os.set_inheritable(report, False)
    for what, most in (
        (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
    ):  # fmt: skip
        with contextlib.suppress(ValueError):  # macOS takes no limit of address space
            resource.setrlimit(what, (most, most))
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")
    os.write(report, b"!")


if __name__ == "__main__":
    main()
