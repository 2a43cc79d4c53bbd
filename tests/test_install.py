"""The set-up commands: clear refusals, no stamp after a failure, nothing to do the second time."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # The tests may run below `make test` themselves: its flags are not for this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "PYTHON"}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_no_usable_python_is_one_clear_line_and_leaves_no_stamp(clone):
    done = make(clone, "test", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "install: no Python 3.11 or 3.12 found (tried: /bin/false)" in done.stderr
    assert not (clone / ".venv" / ".installed").exists()


def test_a_failed_installation_takes_an_old_stamp_away(clone):
    stamp = clone / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (0, 0))  # older than pyproject.toml
    assert make(clone, "install", "PYTHON=/bin/false").returncode != 0
    assert not stamp.exists()


@pytest.mark.parametrize("target", ["quickstart", "test", "test-all", "lint"])
def test_every_command_installs_first_and_only_once(clone, target):
    assert ".ci/install.sh .venv" in make(clone, "-n", target).stdout
    stamp = clone / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert "install.sh" not in make(clone, "-n", target).stdout
    os.utime(stamp, (0, 0))
    assert ".ci/install.sh .venv" in make(clone, "-n", target).stdout


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
