"""The benchmark of server sessions runs and reports; what it counts must agree even in a smoke run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.test_engine_benchmarks import quick


@pytest.mark.slow
def test_server_sessions(tmp_path: Path) -> None:
    figures = quick("server_sessions", tmp_path)
    assert figures["requests"] > 0
    assert figures["errors"] == figures["turns_difference"] == figures["programs_difference"] == 0
    assert figures["reused_share"] > 0.2
