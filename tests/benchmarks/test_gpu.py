"""``benchmarks.gpu`` on a machine without a GPU, vLLM and DeepSpeed: its smoke run, its refusal, and its arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_shapes, gpu_steps

ROOT = Path(__file__).parents[2]
ABSENT = ("vllm", "deepspeed", "openai", "math_verify", "liger_kernel", "kernels")


def gpu(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command where none of ``ABSENT`` can be imported, in every process that it starts."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["train", "shapes", "steps"])
def test_every_part_runs_without_vllm_and_deepspeed(part: str, tmp_path: Path) -> None:
    done = gpu(tmp_path, "--quick", "--part", part)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["benchmark"], last["bars"]) == ("gpu", [])
    figures = last["figures"]
    assert figures and np.isfinite(list(figures.values())).all()
    assert figures.get(f"{part}_failed", 0) == 0, done.stdout
    assert not list(tmp_path.rglob("*.json")), "a smoke run keeps nothing"


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = gpu(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no CUDA device; run it on a machine with an NVIDIA GPU" in done.stderr


@pytest.mark.parametrize("missing", ["nothing", "prefill"])
def test_the_fit_finds_the_machine_that_made_the_steps(missing: str) -> None:
    machine = gpu_steps.own_roofline("qwen3_8b", bandwidth=2.2e12, peak=610e12, overhead=4e-3)
    steps = [("decode", *x) for x in gpu_steps.DECODE]
    if missing == "nothing":
        steps += [("prefill", *x) for x in gpu_steps.PREFILL]
    times = [[*step, machine.seconds(gpu_steps.work(*step))] for step in steps]
    fitted = gpu_steps.fit("qwen3_8b", times)
    assert fitted.bandwidth == pytest.approx(machine.bandwidth) and fitted.overhead == pytest.approx(4e-3)
    if missing == "nothing":
        assert fitted.peak == pytest.approx(machine.peak)
    assert gpu_steps.errors(fitted, times).max() < 1e-6


@pytest.mark.parametrize("arm", gpu_shapes.QUICK)
def test_a_shape_takes_its_steps(arm: str) -> None:
    result = gpu_shapes.run(gpu_shapes.QUICK[arm])
    assert result["seconds"] > 0 and result["tokens"] == 256
    assert set(gpu_shapes.NOT_TENSORS) <= set(result["parts"]) and "engine awake" not in result["parts"]
    assert (result["measured"] is None) == (not torch.cuda.is_available())


def test_flops_of_a_token_are_those_of_the_weights_that_multiply_it() -> None:
    def inputs(arm: gpu_shapes.Arm) -> gpu_shapes.PlanInput:
        return gpu_shapes.plan_of(gpu_shapes.configuration(arm))

    full = inputs(gpu_shapes.SHAPES["qwen3_1.7b 8k"])
    assert gpu_shapes.flops_per_token(full) == 6 * full.shape.parameters == pytest.approx(6 * 1.72e9, rel=1e-2)
    lora = inputs(gpu_shapes.SHAPES["qwen3_8b lora 8k"])
    assert gpu_shapes.flops_per_token(lora) == pytest.approx(4 * 7.57e9 + 6 * lora.shape.adapter, rel=1e-3)
    assert (full.autocast, full.masked, full.residual_bytes) == (True, 0, 4)
    assert (lora.autocast, lora.masked, lora.residual_bytes) == (True, 0, 2)
    assert inputs(gpu_shapes.SHAPES["qwen3_8b lora packed 16k"]).masked == 16384
