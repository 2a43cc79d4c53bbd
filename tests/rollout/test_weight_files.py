"""Weights on their way to an engine: nothing is left of them, and a full disk is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from rollout.engines.weight_files import KeptWeights, rest_of

FULL = """
import resource, signal, sys, torch
from rollout.engines.weight_files import KeptWeights, weight_files
from rollout.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
stream = [("w", torch.zeros(2**19))]
for write in (lambda: KeptWeights(stream, 1), lambda: list(weight_files(stream))):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_a_disk_that_is_full_is_one_line_with_the_folder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith("weights for the engine: 2 MiB do not go into /") and "set TMPDIR" in line


def test_kept_weights_make_a_model_folder_after_the_one_they_came_from_has_gone(tmp_path: Path) -> None:
    model = tmp_path / "step-4"
    (model / "critic").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for name in ("model.safetensors", "model.safetensors.index.json", "optimizer.pt", "tokenizer.json"):
        (model / name).write_bytes(b"?")
    rest = rest_of(model)
    assert set(rest) == {"config.json", "tokenizer.json"}
    kept = KeptWeights([("w", torch.arange(3.0))], 1)
    with kept.folder(rest) as folder:
        assert {path.name for path in folder.iterdir()} == {*rest, "model-00000.safetensors"}
        assert load_file(folder / "model-00000.safetensors")["w"].tolist() == [0.0, 1.0, 2.0]
    kept.close()
    assert not folder.exists()
