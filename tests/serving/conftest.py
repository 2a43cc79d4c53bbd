"""One served checkpoint for every test here."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.lessons import build_parrot
from tests.serving.process import Serving


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_parrot(tmp_path_factory.mktemp("serving") / "parrot")


@pytest.fixture(scope="session")
def serving(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    run_dir = tmp_path_factory.mktemp("run")
    serving = Serving(
        f"checkpoint={checkpoint}", "port=0", f"run_dir={run_dir}", "max_model_len=256", "kv_cache_gib=0.1"
    )
    yield serving
    if serving.process.poll() is None:
        serving.process.send_signal(signal.SIGINT)
        serving.process.wait(60)


@pytest.fixture(scope="session")
def client(serving: Serving) -> Any:
    from openai import OpenAI

    url = serving.wait_for(r"serving +(http://\S+/v1)", timeout=240)[1]
    return OpenAI(base_url=url, api_key="-", max_retries=0, timeout=120)
