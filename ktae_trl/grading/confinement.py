"""Confine a grading worker after its start: it can no longer start processes, write files or use the network.

A worker runs a large parser on text written by a model. If such text ever makes the parser run code, that code can
compute and return a verdict, but nothing else. Resource limits apply on every platform that supports them (the limit
on processes does not apply to root). On Linux with a 64-bit x86 or ARM processor, a seccomp filter also refuses the
corresponding system calls. On a platform that supports neither, the worker is not confined.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
import sys

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH constant, column below
# System call numbers on x86-64 and 64-bit ARM; None if the architecture lacks the call.
_REFUSED = {
    # processes and their memory
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_writev": (311, 271), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "prlimit64": (302, 261), "setrlimit": (160, 164),
    # the network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    # files: opening for writing (for `open` and `openat` the flags decide, see below), creating, removing, renaming
    "creat": (85, None), "openat2": (437, 437), "open_by_handle_at": (304, 265), "truncate": (76, 45),
    "ftruncate": (77, 46), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "unlink": (87, None), "unlinkat": (263, 35), "mknod": (133, None), "mknodat": (259, 33),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88),
    # ways around the filter
    "io_uring_setup": (425, 425), "bpf": (321, 280), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41), "init_module": (175, 105),
    "finit_module": (313, 273), "kexec_load": (246, 104), "reboot": (169, 142),
}  # fmt: skip
_OPENING = {"open": (2, None, 24), "openat": (257, 56, 32)}  # and the offset of the flags in seccomp_data
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FOREIGN = 0x40000000  # x86-64 repeats its calls from here on, for the x32 ABI

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of a seccomp filter
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES = 22, 2, 38  # arguments of prctl


def confine() -> None:
    """Give up permanently what a comparison does not need. Modules can still be imported afterwards."""
    sys.dont_write_bytecode = True
    # Discard what libraries print: from here on, the file that records start-up errors cannot be written.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (0, 0))
    filter_calls()


def filter_calls() -> bool:
    """Make the kernel refuse the calls in `_REFUSED`; return whether this worked."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or sys.maxsize < 1 << 32:
        return False
    program = _program(*_ARCHITECTURES[platform.machine()])
    code = ctypes.create_string_buffer(program)
    # struct sock_fprog: the number of instructions and their address.
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4]
    return prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and prctl(_SECCOMP, _FILTER, whole, 0, 0) == 0


def _program(architecture: int, column: int) -> bytes:
    """Return the filter, 8 bytes per instruction. A jump states how many instructions to skip if true and if false."""
    refuse = (_RETURN, 0, 0, _REFUSE)
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), refuse, (_LOAD, 0, 0, 0)]
    code += [(_AT_LEAST, 0, 1, _FOREIGN), refuse]
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            code += [(_EQUAL, 0, 1, numbers[column]), refuse]
    for *numbers, flags in _OPENING.values():
        if numbers[column] is not None:
            opening = [(_LOAD, 0, 0, flags), (_ANY_BIT, 0, 1, _WRITING), refuse, (_RETURN, 0, 0, _ALLOW)]
            code += [(_EQUAL, 0, len(opening), numbers[column]), *opening]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
