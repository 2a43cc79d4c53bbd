"""vLLM's server as a child process: started, waited for, watched, and never left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from rollout.children import ends_with_parent
from rollout.errors import EngineDied, UserError, WaitTimeout

BACKLOG = 2048  # connections that wait to be accepted, as vLLM's own server has
MAX_CHARS = 300  # of an error taken from the log
LOG_TAIL = 2**20  # bytes of the log in which an error is looked for: after days it is long
KILLED_S = 30.0  # for a killed process to be gone
LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^]]*\] )?")
ERROR_LINE = re.compile(r"([\w.]*(Error|Exception)|[\w.]+: error): ")
ELSEWHERE = re.compile(r"[Ss]ee (root cause|stack trace)")  # an error that only points to another


def free_port(host: str, port: int) -> int:
    """``port``, or any free one for 0. Raises UserError if it cannot be bound."""
    with bound(host, port) as probe:
        return int(probe.getsockname()[1])


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to ``port``, or to any free one for 0, and does not listen. UserError if it cannot be."""
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, port))
    except OSError as error:
        holder.close()
        raise _unusable(host, port, error) from None
    return holder


def listening(holder: socket.socket) -> None:
    """Let a bound socket listen. UserError if another got there first: what is only bound, two may be."""
    host, port = holder.getsockname()[:2]
    try:
        holder.listen(BACKLOG)
    except OSError as error:
        raise _unusable(host, port, error) from None


def _unusable(host: str, port: int, error: OSError) -> UserError:
    problem = f"{host}:{port} cannot be used ({error.strerror or error})"
    return UserError(f"port: {problem}; give another port=..., or port=0")


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server:
    """One server process in a session of its own, so that a Ctrl-C in the terminal reaches only its parent."""

    def __init__(self, command: list[str], environment: dict[str, str], url: str, log: Path) -> None:
        self.url = url
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._log_start = stream.tell()  # what stands before was written by a server that this one replaces
            self.process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ends_with_parent(),
            )

    def wait_ready(self, timeout: float, waiting: Callable[[float], None]) -> None:
        """Return once /health answers, else raise EngineDied or WaitTimeout; calls ``waiting(seconds)`` meanwhile."""
        start = time.monotonic()
        while not self.healthy():
            seconds = time.monotonic() - start
            self.check_starting(seconds, timeout)
            waiting(seconds)
            time.sleep(0.25)

    def check_starting(self, seconds: float, timeout: float) -> None:
        """Raise EngineDied if the server ended while it was starting, WaitTimeout if that takes too many seconds."""
        if self.process.poll() is not None:
            raise EngineDied(f"the server did not start: {self.last_words()} (log: {self.log})")
        if seconds > timeout:
            raise WaitTimeout(f"waited {timeout:g} s for {self.url}/health; raise start_timeout_s, or see {self.log}")

    def healthy(self) -> bool:
        """Whether /health says so."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> None:
        """Until the process ends by itself, which it never should: always raises EngineDied."""
        code = self.process.wait()
        raise EngineDied(f"the server ended with code {code}: {self.last_words()} (log: {self.log})")

    def stop(self, timeout: float) -> None:
        """Ask for an orderly end, wait ``timeout`` seconds, then kill the session; a second Ctrl-C kills at once."""
        stop_all([self], timeout)

    def kill(self) -> None:
        """End the whole session at once; a process that a driver holds may outlast it, and its wait is bounded."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILLED_S)

    def last_words(self) -> str:
        """The last error in the log, rather one that does not point to another; else the last line."""
        with self.log.open("rb") as stream:
            stream.seek(max(self._log_start, self.log.stat().st_size - LOG_TAIL))
            text = stream.read().decode("utf-8", errors="replace")
        lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines() if line.strip()]
        errors = [i for i, line in enumerate(lines) if ERROR_LINE.match(line)]
        named = [i for i in errors if not ELSEWHERE.search(lines[i])] or errors
        if not named:
            return lines[-1] if lines else "it printed nothing"
        line = lines[named[-1]]
        if " validation error" in line:  # pydantic says what is wrong on the line after
            line = lines[min(named[-1] + 1, len(lines) - 1)]
        return line if len(line) <= MAX_CHARS else f"{line[:MAX_CHARS]}…"


def stop_all(servers: Sequence[Server], timeout: float) -> None:
    """``Server.stop`` of several at the same time."""
    deadline = time.monotonic() + timeout
    try:
        for server in servers:
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGINT)
        for server in servers:
            server.process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass  # what is left is killed below
    finally:
        for server in servers:
            server.kill()
