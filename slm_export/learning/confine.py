"""Runs a command with little: run as a program of its own, which imports nothing of this package.

    python -I -S confine.py LIMITS COMMAND...

LIMITS is JSON: seconds of processor time, bytes of memory and of a file, open files and processes, and whether the
system can give namespaces of its own. In those the command has no network, and everything that it starts dies with it,
whether it left its process group or not.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_NEWUSER, _NEWNET, _NEWPID = 0x10000000, 0x40000000, 0x20000000
_PR_SET_PDEATHSIG = 1
REFUSED, NO_COMMAND = 125, 127
"""Exit codes: the system does not give namespaces; the command cannot be started."""


def main(limits: dict[str, int], command: list[str]) -> int:
    """Run the command; returns its exit code, or 128 and the number of the signal that ended it."""
    if limits["namespaces"]:
        try:
            _enter_namespaces()
        except OSError as error:
            print(error, file=sys.stderr)
            return REFUSED
        # The first process of a namespace of processes: when it ends, the system ends all others in there.
        return _ending_of(lambda: _ending_of(lambda: _become(limits, command)))
    return _ending_of(lambda: _become(limits, command))


def _enter_namespaces() -> None:
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWUSER | _NEWNET | _NEWPID):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _ending_of(work) -> int:  # type: ignore[no-untyped-def]
    """Do work in a child that dies with this process, and return how it ended."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        code = NO_COMMAND
        try:
            _die_with_parent(parent)
            code = work()
        except BaseException as error:  # noqa: BLE001 - nothing of a forked child may run on
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    while True:
        ended, status = os.wait()  # the first process of a namespace is given orphans, too
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # 0: the parent is outside of this namespace.
        if os.getppid() not in (parent, 0, 1):
            os._exit(REFUSED)


def _become(limits: dict[str, int], command: list[str]) -> int:
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file"],
        resource.RLIMIT_NOFILE: limits["open"],
        resource.RLIMIT_CORE: 0,
    }
    if limits["namespaces"]:
        # Counted in the namespace of the user there, and over all of the user's processes elsewhere.
        bounds[resource.RLIMIT_NPROC] = limits["processes"]
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
