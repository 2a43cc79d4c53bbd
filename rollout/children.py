"""Child processes that do not outlive this one."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def ends_with_parent() -> Callable[[], None] | None:
    """``preexec_fn`` of a child that gets SIGTERM when its parent is killed outright and can stop nothing any more.

    The kernel means the thread that starts the child: that one must live as long. None where there is no such signal.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # loaded here: after the fork another's lock may be held

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # gone before the kernel knew of the wish
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
