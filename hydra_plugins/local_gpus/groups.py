"""Process groups that end as a whole, and the signals that end a sweep."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

GRACE_S = 10.0  # between asking a group to end and ending it
POLL_S = 0.1


def end_groups(leaders: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every process group to end, wait, then end it: an engine left behind would keep its GPU memory.

    A second Ctrl-C cuts the wait short, and the groups are ended all the same.
    """
    try:
        for leader in leaders:
            _signal_group(leader, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(_group_lives(leader) for leader in leaders):
            time.sleep(POLL_S)
    finally:
        for leader in leaders:
            _signal_group(leader, signal.SIGKILL)
        for leader in leaders:
            leader.wait(timeout=GRACE_S)


def _group_lives(leader: subprocess.Popen[bytes]) -> bool:
    leader.poll()  # reap the leader: a zombie would keep the group alive
    return _signal_group(leader, 0)


def _signal_group(leader: subprocess.Popen[bytes], number: int) -> bool:
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def interrupted_by(*numbers: signal.Signals) -> Iterator[None]:
    """These signals end the block as Ctrl-C does; one that is ignored, as nohup has it, stays ignored."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in numbers}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
