"""A filter of system calls, built with libseccomp: it refuses calls that a judged program has no need of."""

from __future__ import annotations

import ctypes
import errno
import os

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
"""The actions of libseccomp."""

MASKED_EQUAL = 7
"""The comparison (argument & mask) == value of libseccomp."""

EVERY_BIT = 0xFFFFFFFF

MAP_SHARED = 1

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25

REFUSED_CALLS = (  # noqa: SIM905
    "fork vfork clone "  # a program has one process and one thread, because nothing else bounds their number
    "socket socketpair "
    # These give memory that is not counted as the process's own.
    "memfd_create memfd_secret vmsplice io_setup shmget shmat mq_open msgget semget "
    "inotify_init inotify_init1 inotify_add_watch fanotify_init "  # these show what other processes do with files
    "ptrace process_vm_readv process_vm_writev kcmp pidfd_open pidfd_getfd pidfd_send_signal "
    "mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsmount "
    "add_key request_key keyctl bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register "
    "name_to_handle_at open_by_handle_at kexec_load init_module finit_module delete_module "
    "reboot swapon swapoff acct quotactl syslog personality settimeofday clock_settime sethostname setdomainname"
).split()
"""The system calls that fail with EPERM."""

SINCE = {"memfd_secret": 447}
"""The numbers, equal on every processor, of calls whose names an older libseccomp does not know."""


class Unavailable(OSError):
    """libseccomp is missing or too old."""


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def program() -> bytes:
    """Build the filter for this machine's processor, in the form that the kernel takes (classic BPF).

    Raises:
        Unavailable: without libseccomp 2.5 or newer.
    """
    try:
        library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as error:
        raise Unavailable(f"libseccomp.so.2 cannot be loaded ({error}); install libseccomp2") from error
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(ALLOW)))
    try:
        _fill(library, context)
        return _exported(library, context)
    finally:
        library.seccomp_release(context)


def _fill(library: ctypes.CDLL, context: ctypes.c_void_p) -> None:
    for name in REFUSED_CALLS:
        _refuse(library, context, name, errno.EPERM)
    _refuse(
        library, context, "clone3", errno.ENOSYS
    )  # a filter cannot see its flags; the C library falls back to clone
    # The limit on a process's memory counts mappings, but shared pages and huge pages stay in memory when most of
    # their mapping is given back.
    _refuse(library, context, "mmap", errno.EPERM, _Comparison(3, MASKED_EQUAL, MAP_SHARED, MAP_SHARED))
    for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
        _refuse(library, context, "madvise", errno.EPERM, _Comparison(2, MASKED_EQUAL, EVERY_BIT, advice))


def _refuse(library: ctypes.CDLL, context: ctypes.c_void_p, name: str, code: int, *when: _Comparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    number = SINCE.get(name, -1) if number == -1 else number
    if number == -1:
        raise Unavailable(f"the installed libseccomp does not know the system call {name}; it must be 2.5 or newer")
    rule = (_Comparison * len(when))(*when)
    status = library.seccomp_rule_add_array(context, ctypes.c_uint32(ERRNO | code), number, len(when), rule)
    if status != 0:
        raise Unavailable(f"libseccomp cannot refuse the system call {name}: {os.strerror(-status)}")


def _exported(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader:
        try:
            status = library.seccomp_export_bpf(context, write_end)
        finally:
            os.close(write_end)
        if status != 0:
            raise Unavailable(f"libseccomp cannot write its filter: {os.strerror(-status)}")
        return reader.read()
