"""The sweep launcher: a toy Hydra application, swept in real subprocesses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.errors import HydraException

from hydra_plugins.local_gpus.command import program
from hydra_plugins.local_gpus.groups import GRACE_S
from hydra_plugins.local_gpus.jobs import last_line
from hydra_plugins.local_gpus.slots import device_slots

TOY = """
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig


@dataclass
class Settings:
    a: int = 0
    name: str = ""
    does: str = "return"
    number: int = -1


ConfigStore.instance().store(name="toy", node=Settings)
multirun = Hydra.multirun


def multirun_and_show(self, **arguments):
    jobs = [job for batch in multirun(self, **arguments) for job in batch]
    print("RESULTS", json.dumps([[list(job.overrides), job.return_value, job.cfg.a] for job in jobs]))


Hydra.multirun = multirun_and_show


@hydra.main(version_base=None, config_path=None, config_name="toy")
def main(cfg):
    start = time.time()
    print("working on", cfg.a, flush=True)
    if cfg.does == "fail":
        sys.exit(f"error: no luck with {cfg.a}")
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.does == "start anew and fail":
        shutil.rmtree(folder)
        sys.exit("error: no luck this time")
    if cfg.does.startswith("evaluate"):
        numbers = dict.fromkeys(["accuracy_low", "accuracy_high", "tool_calls", "tokens", "thinking"], 0.5)
        sampled = {"accuracy": cfg.a / 8, "trigger": None, "tool_productivity": None, "e3": None, "by_difficulty": {}}
        record = {"name": f"toy {cfg.a}", "sampled": sampled | numbers}
        (folder / "evaluation.json").write_text(json.dumps(record))
    if cfg.does == "evaluate and fail":
        sys.exit("error: no luck after all")
    if cfg.does == "object":
        return object()
    if cfg.does == "stay":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cfg.does in ("hang", "stay"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("PIDS", os.getpid(), child.pid, flush=True)
        time.sleep(600)
    time.sleep(0.3)
    return {
        "a": cfg.a, "name": cfg.name, "number": HydraConfig.get().job.num, "pid": os.getpid(), "start": start,
        "end": time.time(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return tmp_path


def start(
    folder: Path, *overrides: str, module: bool = False, gpus: str | None = None, under: tuple[str, ...] = ()
) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR")}
    # No GPU of the machine may enter: an empty list hides them all.
    environment["CUDA_VISIBLE_DEVICES"] = gpus or ""
    command = [
        *under,
        sys.executable,
        *(["-m", "toy"] if module else ["toy.py"]),
        "--multirun",
        "hydra/launcher=local_gpus",
    ]
    return subprocess.Popen(
        [*command, "hydra.sweep.dir=sweep", *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *overrides: str, **options) -> tuple[int, str, str]:
    process = start(folder, *overrides, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def results(out: str) -> list[list]:
    return json.loads(next(line for line in out.splitlines() if line.startswith("RESULTS"))[len("RESULTS") :])


def hanging(process: subprocess.Popen, folder: Path, jobs: int) -> list[int]:
    """Process ids of jobs that hang and of the child of each, once all are there."""
    logs = [folder / "sweep" / f"{i}.log" for i in range(jobs)]
    wait_until(lambda: all(log.exists() and "PIDS" in log.read_text() for log in logs), process)
    return [int(pid) for log in logs for pid in last_line(log).split()[1:]]


def wait_until(there, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent (init of a container) does not reap is dead too.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_each_job_is_a_fresh_interpreter_and_its_value_comes_back_in_order(toy):
    code, out, err = run(toy, "a=1,2,3", "name='u=v, w'", "hydra.launcher.slots=2")
    assert code == 0, err
    jobs = results(out)
    assert [job[0] for job in jobs] == [[f"a={a}", "name='u=v, w'"] for a in (1, 2, 3)]
    assert [job[2] for job in jobs] == [1, 2, 3]
    values = [job[1] for job in jobs]
    assert [value["a"] for value in values] == [1, 2, 3]
    assert [value["number"] for value in values] == [0, 1, 2]
    assert {value["name"] for value in values} == {"u=v, w"}
    assert len({value["pid"] for value in values}) == 3
    running = [sum(o["start"] <= v["start"] < o["end"] for o in values) for v in values]
    assert max(running) <= 2
    assert [(toy / "sweep" / f"{a - 1}.log").read_text() == f"working on {a}\n" for a in (1, 2, 3)] == [True] * 3


def test_module_and_config_directory_are_passed_on(toy):
    (toy / "extra").mkdir()
    (toy / "extra" / "mine.yaml").write_text("defaults: [toy, _self_]\na: 7\n")
    code, out, err = run(toy, "name=x,y", "--config-dir", "extra", "--config-name", "mine", module=True)
    assert code == 0, err
    assert [(job[1]["a"], job[1]["name"]) for job in results(out)] == [(7, "x"), (7, "y")]


def test_one_cpu_slot_by_default_and_devices_from_a_queue(toy):
    code, out, err = run(toy, "a=1,2")
    assert code == 0, err
    first, second = (job[1] for job in results(out))
    assert first["end"] <= second["start"]

    code, out, err = run(toy, "a=1,2,3", "hydra.launcher.gpus_per_job=2", gpus="4,5,6,7")
    assert code == 0, err
    seen = [job[1]["gpus"] for job in results(out)]
    assert seen[:2] == ["4,5", "6,7"]
    assert seen[2] in ("4,5", "6,7")


def test_a_failed_job_is_named_with_its_last_line_and_the_others_still_run(toy):
    code, out, err = run(toy, "a=1,2", "does=fail,return", "hydra.launcher.slots=2")
    assert code == 1
    assert "RESULTS" not in out
    assert "2 of 4 jobs failed: #0 a=1 does=fail: exit code 1: error: no luck with 1 (log: " in err
    assert "Traceback" not in err
    assert "#1 a=1 does=return: done" in out
    assert (toy / "sweep" / "3" / "return_value.json").exists()


def test_a_value_that_json_cannot_hold_is_a_failure(toy):
    code, _, err = run(toy, "does=object")
    assert code == 1
    assert "return value cannot be kept as JSON" in err


def test_a_job_over_its_time_is_ended(toy):
    began = time.monotonic()
    code, _, err = run(toy, "does=hang", "hydra.launcher.job_timeout_s=2")
    assert code == 1
    assert "did not end in hydra.launcher.job_timeout_s=2" in err
    assert time.monotonic() - began < 20


def test_a_job_that_deletes_its_directory_and_fails_keeps_its_log_and_the_others_run(toy):
    code, out, err = run(toy, "a=1", "does='start anew and fail',return", "hydra.launcher.slots=2")
    assert code == 1 and "Traceback" not in err
    assert "1 of 2 jobs failed: #0 a=1 does='start anew and fail': exit code 1: error: no luck this time (log: " in err
    assert (toy / "sweep" / "0.log").read_text() == "working on 1\nerror: no luck this time\n"
    assert "#1 a=1 does=return: done" in out


def test_a_file_in_the_place_of_a_jobs_directory_fails_that_job_only(toy):
    (toy / "sweep").mkdir()
    (toy / "sweep" / "0").touch()
    code, out, err = run(toy, "a=1,2")
    assert code == 1 and "Traceback" not in err
    assert "1 of 2 jobs failed: #0 a=1: exit code 1" in err
    assert "#1 a=2: done" in out


def test_the_table_at_the_end_has_the_jobs_that_did_finish(toy):
    table = "+hydra.callbacks.combine._target_=rollout.evaluate.Combine"
    code, out, err = run(toy, "a=1,2", "does=evaluate,'evaluate and fail'", table, "hydra.launcher.slots=2")
    assert code == 1
    assert "2 of 4 jobs failed: #1 a=1 does='evaluate and fail': exit code 1: error: no luck after all" in err
    assert "accuracy on unseen questions" in out and "toy 1" in out and "toy 2" in out
    records = json.loads((toy / "sweep" / "evaluation.json").read_text())
    assert [record["sampled"]["accuracy"] for record in records] == [1 / 8, 2 / 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_sweep_leaves_no_process(toy, number):
    process = start(toy, "does=hang", "a=1,2", "hydra.launcher.slots=2")
    pids = hanging(process, toy, jobs=2)
    assert len(pids) == 4
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not [pid for pid in pids if alive(pid)]


def test_a_second_ctrl_c_ends_at_once_the_jobs_that_do_not_listen(toy):
    process = start(toy, "does=stay", "a=1,2", "hydra.launcher.slots=2")
    pids = hanging(process, toy, jobs=2)
    leaders, began = pids[::2], time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert all(alive(pid) for pid in leaders) and process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - began < GRACE_S
    assert not [pid for pid in pids if alive(pid)]


def test_a_sweep_that_is_killed_takes_its_jobs_along(toy):
    process = start(toy, "does=hang", "a=1,2", "hydra.launcher.slots=2")
    pids = hanging(process, toy, jobs=2)
    try:
        process.kill()
        process.communicate(timeout=30)
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in pids[::2]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:  # what the toy's jobs started does not watch its parent, as our engines do
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_sweep_under_nohup_outlives_its_terminal(toy):
    process = start(toy, "a=1,2,3", under=("nohup",))
    log = toy / "sweep" / "0.log"
    wait_until(lambda: log.exists() and "working on" in log.read_text(), process)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert [job[1]["a"] for job in results(out)] == [1, 2, 3]


def test_slots_that_cannot_be_had_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert device_slots(None, 1) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    with pytest.raises(HydraException, match=r"hydra.launcher.slots: 2 jobs of 2 GPUs need 4, 2 are visible"):
        device_slots(2, 2)
    with pytest.raises(HydraException, match=r"hydra.launcher.slots: 0 must be at least 1"):
        device_slots(0, 1)


def test_program_is_found_behind_interpreter_options():
    assert program(["python", "-X", "dev", "-m", "training", "a=1"]) == [sys.executable, "-X", "dev", "-m", "training"]
    assert program(["python", "-u", "bin/turnstile-train", "-m"]) == [sys.executable, "-u", "bin/turnstile-train"]
    with pytest.raises(HydraException, match="needs a script"):
        program(["python", "-c", "pass"])
