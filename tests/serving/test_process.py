"""The server's process is waited for with a time-out, explains its death, and is never left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rollout.errors import EngineDied, WaitTimeout
from serving.server import Server, base_url, free_port
from tests.serving.process import Serving, alive

DEAF_WITH_CHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"])
print("ready", flush=True)
time.sleep(600)
"""


def start(code: str, log: Path) -> Server:
    url = base_url("127.0.0.1", free_port("127.0.0.1", 0))
    return Server([sys.executable, "-c", code], {}, url, log)


ENGINE = "(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:1] "


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (f"{ENGINE}ValueError: no memory\nlast", "ValueError: no memory"),
        (f"{ENGINE}ValueError: no memory\n  RuntimeError: failed. See root cause above.", "ValueError: no memory"),
        ("x.ValidationError: 1 validation error for M\n  Value error, too long\n  more", "Value error, too long"),
        ("api_server.py: error: unrecognized arguments: --x", "api_server.py: error: unrecognized arguments: --x"),
        ("E.DeadError: see above. See stack trace\nleaks", "E.DeadError: see above. See stack trace"),
        ("some words\nlast words", "last words"),
        ("", "it printed nothing"),
    ],
)
def test_death_at_start_is_explained(tmp_path: Path, log: str, words: str) -> None:
    server = start(f"print({log!r}); raise SystemExit(1)", tmp_path / "engine.log")
    with pytest.raises(EngineDied) as raised:
        server.wait_ready(30, lambda seconds: None)
    assert str(raised.value) == f"the server did not start: {words} (log: {tmp_path / 'engine.log'})"
    server.stop(1)


def test_time_out_names_what_was_waited_for(tmp_path: Path) -> None:
    server = start("import time; time.sleep(600)", tmp_path / "engine.log")
    with pytest.raises(WaitTimeout, match=r"waited 0.5 s for http://127.0.0.1:\d+/health; raise start_timeout_s"):
        server.wait_ready(0.5, lambda seconds: None)
    server.stop(5)
    assert server.process.returncode is not None


def test_death_while_serving(tmp_path: Path) -> None:
    server = start("print('RuntimeError: gone'); raise SystemExit(3)", tmp_path / "engine.log")
    with pytest.raises(EngineDied, match="ended with code 3: RuntimeError: gone"):
        server.wait()


@pytest.mark.parametrize("second_ctrl_c", [False, True])
def test_deaf_processes_are_killed_with_their_children(tmp_path: Path, second_ctrl_c: bool) -> None:
    log = tmp_path / "engine.log"
    server = start(DEAF_WITH_CHILD, log)
    deadline = time.monotonic() + 30
    while "ready" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
    assert len(processes) == 2
    if second_ctrl_c:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start_s = time.monotonic()
    server.stop(30 if second_ctrl_c else 0.5)
    assert time.monotonic() - start_s < 20
    assert not alive(processes)
    server.stop(0.5)


def serve(checkpoint: Path, run_dir: Path) -> Serving:
    return Serving(f"checkpoint={checkpoint}", "port=0", f"run_dir={run_dir}", "kv_cache_gib=0.1")


def test_ctrl_c_while_starting(checkpoint: Path, tmp_path: Path) -> None:
    serving = serve(checkpoint, tmp_path)
    child = serving.child()
    serving.process.send_signal(signal.SIGINT)
    assert serving.finished().endswith("error: interrupted\n")
    assert serving.process.returncode == 130
    assert not alive([child])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_nothing_outlives_a_killed_parent(checkpoint: Path, tmp_path: Path) -> None:
    serving = serve(checkpoint, tmp_path)
    child = serving.child()
    serving.process.kill()
    serving.process.wait()
    assert not alive([child])
