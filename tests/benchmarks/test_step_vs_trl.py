import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_arms_take_turns():
    command = [sys.executable, "-m", "benchmarks.step_vs_trl", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["bars"] == []
    assert last["figures"]["ratio_to_trl"] > 0
