"""Settings become vLLM's flags; bad settings and a used port are refused in one line before vLLM starts."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.config import MIDDLEWARE, PROGRAM_SCHEDULER, SchedulerConfig
from rollout.errors import UserError
from serving.command import flags, server_command
from serving.config import ServingConfig
from serving.parsers import Parsers
from serving.server import base_url, free_port
from tests.serving.process import ROOT, Serving


def test_flags() -> None:
    options = {"a": 1, "b": True, "c": False, "d": [1, 2], "e": {"x": None}, "f": None}
    assert flags(options) == ["--a", "1", "--b", "--no-c", "--d", "1", "2", "--e", '{"x": null}']


BOTH = Parsers("hermes", "turnstile")


def command(config: ServingConfig, *, cpu: bool, parsers: Parsers = BOTH) -> str:
    return " ".join(server_command(config, Path("model"), "name", parsers, None, cpu=cpu))


def test_stock_scheduler_adds_no_flag() -> None:
    words = command(ServingConfig(), cpu=True)
    assert "--scheduler-cls" not in words
    assert "--additional-config" not in words


def test_scheduler_and_its_options() -> None:
    scheduler = SchedulerConfig(cls="package.Scheduler", options={"pins": 3})
    words = command(ServingConfig(scheduler=scheduler), cpu=False)
    assert '--scheduler-cls package.Scheduler --additional-config {"pins": 3}' in words


def test_our_scheduler_brings_its_middleware() -> None:
    """Beside a middleware of the user's own: vLLM appends each."""
    options = {"turnstile": {"policy": "plas"}}
    ours = ServingConfig(scheduler=SchedulerConfig(cls=PROGRAM_SCHEDULER, options=options))
    words = command(dataclasses.replace(ours, extra={"middleware": "my.Middleware"}), cpu=True)
    assert f'--scheduler-cls {PROGRAM_SCHEDULER} --additional-config {{"turnstile": {{"policy": "plas"}}}}' in words
    assert f"--middleware {MIDDLEWARE}" in words
    assert words.endswith("--middleware my.Middleware")
    stock = SchedulerConfig(cls=PROGRAM_SCHEDULER, options={"turnstile": {"policy": "priority"}})
    assert "--middleware" not in command(ServingConfig(scheduler=stock), cpu=True)


def test_parsers() -> None:
    words = command(ServingConfig(), cpu=False)
    assert "--enable-auto-tool-choice --tool-call-parser hermes" in words
    assert "--reasoning-parser turnstile --reasoning-parser-plugin serving.reasoning_parser" in words
    words = command(ServingConfig(), cpu=False, parsers=Parsers(None, "qwen3"))
    assert "tool" not in words
    assert "plugin" not in words


def test_cpu_and_gpu() -> None:
    words = command(ServingConfig(kv_cache_gib=0.5), cpu=True)
    assert "--enforce-eager" in words
    assert "--kv-cache-memory-bytes 536870912" in words
    words = command(ServingConfig(enforce_eager=False, gpu_memory_utilization=0.7), cpu=False)
    assert "--no-enforce-eager" in words
    assert "--gpu-memory-utilization 0.7" in words


def test_extra_flags_have_the_last_word() -> None:
    words = command(ServingConfig(extra={"max_num_seqs": 3, "enable-lora": True, "dtype": "half"}), cpu=False)
    assert "--dtype half" in words
    assert "--max-num-seqs 3" in words
    assert words.endswith("--enable-lora")


def test_each_replica_has_devices_of_its_own() -> None:
    """As vLLM counts them: among those that CUDA_VISIBLE_DEVICES leaves."""
    config = ServingConfig(tensor_parallel_size=2, extra={"pipeline_parallel_size": 2}, replicas=2)
    words = [server_command(config, Path("m"), "n", BOTH, None, cpu=False, replica=replica) for replica in (0, 1)]
    assert [each[each.index("--device-ids") + 1] for each in words] == ["0,1,2,3", "4,5,6,7"]
    assert "--device-ids" not in command(dataclasses.replace(config, replicas=1), cpu=False)
    assert "--device-ids" not in command(config, cpu=True)


def test_urls() -> None:
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"
    assert base_url("example.org", 80) == "http://example.org:80"


def test_any_free_port() -> None:
    assert free_port("127.0.0.1", 0) > 0


@pytest.fixture
def used_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(*overrides: str) -> str:
    serving = Serving(*overrides)
    line = serving.finished(30)
    assert serving.process.returncode == 2
    assert line.count("\n") == 1
    return line


def test_port_in_use(checkpoint: Path, used_port: int) -> None:
    line = refused(f"checkpoint={checkpoint}", f"port={used_port}")
    assert f"port: 127.0.0.1:{used_port} cannot be used (Address already in use); give another port=" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=no/such/folder"], "checkpoint: no/such/folder is not a folder"),
        ([], "checkpoint: required and not given"),
        (["checkpoint=x", "prot=1"], "prot: unknown key; did you mean port?"),
        (["checkpoint=x", "port=abc"], "port: "),
        (["checkpoint=x", "replicas=0"], "replicas: 0 must be at least 1"),
        (["checkpoint=x", "replicas=2", "+extra.ssl-keyfile=k"], "extra.ssl-keyfile: replicas answer by plain HTTP"),
        (
            ["checkpoint=x", "replicas=2", "+extra.device_ids=1"],
            "extra.device_ids: each replica has its own; set CUDA_",
        ),
        (["checkpoint=x", "port=70000"], "port: 70000 is not a port"),
        (["checkpoint=x", "scheduler=none_such"], "scheduler=none_such: no such choice; there are: continuum, fcfs"),
        (["checkpoint=x", "scheduler=program_cap"], "scheduler.options.turnstile.cap: required and not given"),
        (["checkpoint=x", "scheduler=plas", "scheduler.options.turnstile.policy=x"], "unknown policy 'x'; there are"),
    ],
)
def test_bad_settings(overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


@pytest.mark.parametrize(
    ("key", "value"),
    [("port", -1), ("start_timeout_s", 0), ("kv_cache_gib", -1), ("gpu_memory_utilization", 1.5), ("max_model_len", 0)],
)
def test_impossible_values(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{key}: {value} "):
        ServingConfig(**{key: value}).check()


def test_settings_are_instant() -> None:
    """Neither torch nor vLLM on the way to --help and --cfg job."""
    code = "import sys, serving.__main__; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
