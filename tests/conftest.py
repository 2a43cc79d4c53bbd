"""What all tests share: tiny models, and one vLLM engine in this process (vLLM can hold no second)."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None)  # how long an example takes depends on the neighbours
settings.load_profile("shared_machine")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # best for tiny models, and tests share few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from rollout.engines.vllm_in_process import InProcessEngine

SHARED = Path(__file__).parents[1].parent / "shared"


class Loop:
    """An event loop on its own thread, so that plain tests can await an engine with a time-out."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def __call__(self, coroutine: Coroutine[Any, Any, Any], seconds: float = 120.0) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def run() -> Iterator[Loop]:
    """Run a coroutine to its end: ``run(engine.generate(...))``."""
    loop = Loop()
    yield loop
    loop.close()


def spread_model(directory: Path, *, tied: bool = True, seed: int = 0, vocab: int = 512) -> Path:
    """A Qwen3 of 0.5M parameters, wide enough in its log-probs that a stale layer shows; no tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    return directory


def load_model(directory: Path) -> Any:
    """The trainer's side: the same folder as an fp32 transformers model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture
def trainer_model(model_dir: Path) -> Any:
    """A fresh copy of the model that the engines were started with."""
    return load_model(model_dir)


@pytest.fixture(scope="session")
def vllm_engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory, run: Loop) -> Iterator[InProcessEngine]:
    """The session's in-process vLLM engine on ``model_dir``. Tests that change its weights put them back."""
    from rollout.config import VllmConfig
    from rollout.engines.vllm import build

    log_path = tmp_path_factory.mktemp("engine") / "engine.log"
    engine = build(VllmConfig(max_model_len=512, kv_cache_gib=0.25, timeout_s=60.0), str(model_dir), log_path=log_path)
    yield engine
    run(engine.close())
