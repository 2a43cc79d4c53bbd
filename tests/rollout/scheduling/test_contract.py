"""What the plug-in uses of vLLM is named, and what is named is there."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import CacheConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from rollout.errors import UserError
from rollout.scheduling import contract, program_scheduler
from tests.rollout.scheduling.driver import build

PACKAGE = Path(program_scheduler.__file__).parent
MODULES = ("program_scheduler", "vllm_plugin", "pins", "program_queue", "identity", "shortage", "contract")

# How the plug-in calls what is vLLM's.
NAMES: dict[str, type] = {
    "request": Request, "block": KVCacheBlock, "place": KVCacheBlock, "following": KVCacheBlock, "pool": BlockPool,
    "_pool": BlockPool, "block_pool": BlockPool, "queue": FreeKVCacheBlockQueue,
    "free_block_queue": FreeKVCacheBlockQueue,
    "kv_cache_manager": KVCacheManager, "manager": KVCacheManager, "coordinator": KVCacheCoordinator,
    "output": SchedulerOutput, "scheduler_output": SchedulerOutput,
    "sampling_params": SamplingParams, "config": VllmConfig, "vllm_config": VllmConfig, "cache_config": CacheConfig,
    "scheduler_config": SchedulerConfig, "parallel_config": ParallelConfig, "RequestStatus": RequestStatus,
    "PauseState": PauseState, "SchedulingPolicy": SchedulingPolicy,
    "structured_output_manager": StructuredOutputManager,
}  # fmt: skip


def test_nothing_is_missing_here() -> None:
    assert contract.missing() == []


def named(owner: type) -> set[str]:
    return {*contract.METHODS.get(owner, {}), *contract.ATTRIBUTES.get(owner, ())}


def owner_of(value: ast.expr) -> type | None:
    """Whose attribute it is, by how the plug-in calls the thing."""
    said = ast.unparse(value)
    if said.startswith("self.kv_cache_manager.get_blocks("):
        return KVCacheBlocks
    return NAMES.get(said.rsplit(".", 1)[-1])


def test_all_that_the_source_uses_is_named() -> None:
    used: set[tuple[type, str]] = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.Attribute) and (owner := owner_of(node.value)) is not None:
                used.add((owner, node.attr))
    mixin = ast.parse(inspect.getsource(program_scheduler.ProgramMixin))
    adopt = ast.parse(textwrap.dedent(inspect.getsource(program_scheduler.ProgramMixin.adopt)))
    own = {x.attr for x in ast.walk(adopt) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store)}
    own |= {name for name in vars(program_scheduler.ProgramMixin) if not hasattr(Scheduler, name)}
    for node in ast.walk(mixin):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()") and node.attr not in own:
            used.add((Scheduler, node.attr))
    used |= {(RequestQueue, name) for name in RequestQueue.__abstractmethods__}
    assert not {f"{owner.__name__}.{name}" for owner, name in used if name not in named(owner)}


def test_what_is_named_is_used() -> None:
    used = {
        word
        for module in MODULES[:-1]
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
        for word in ([node.attr] if isinstance(node, ast.Attribute) else [getattr(node, "name", None)])
    }
    checked = {"cache_config", "enable_prefix_caching"}  # by the contract itself
    for owner in {*contract.METHODS, *contract.ATTRIBUTES}:
        assert named(owner) <= used | checked, owner


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, methods in contract.METHODS.items() for name in methods]
)
def test_a_method_that_is_gone_is_named(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name)
    if not hasattr(owner, name) or owner is Scheduler:  # dict and object lend some names to other classes
        assert contract.missing() == [f"{owner.__name__}.{name}"]


def test_a_parameter_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_blocks(self: Any, blocks: Any) -> None: ...

    monkeypatch.setattr(BlockPool, "free_blocks", free_blocks)
    assert contract.missing() == ["BlockPool.free_blocks(ordered_blocks)"]


@pytest.mark.parametrize(
    ("owner", "old", "new"),
    [
        (Scheduler, "self.kv_holding_waiting", "self.holding"),
        (KVCacheBlock, "is_null", "null"),
        (Request, "self.session_id", "self.session"),
        (SchedulerOutput, "total_num_scheduled_tokens", "total"),
        (StructuredOutputManager, "self.tokenizer", "self.words"),
    ],
)
def test_an_attribute_that_is_gone_is_named(owner: type, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = contract._source
    monkeypatch.setattr(contract, "_source", lambda c: sources(c).replace(old, new) if c is owner else sources(c))
    name = old.removeprefix("self.")
    if name in vars(owner):  # a default of a dataclass
        monkeypatch.delattr(owner, name)
    assert contract.missing() == [f"{owner.__name__}.{name}"]


@pytest.mark.parametrize(("module", "words"), [(module, x) for module, found in contract.WORDS.items() for x in found])
def test_words_of_the_front_end_that_are_gone_are_named(
    module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = contract._text
    monkeypatch.setattr(contract, "_text", lambda m: texts(m).replace(words, "") if m == module else texts(m))
    assert contract.missing() == [f'"{words}" in {module}']


def test_a_module_of_the_front_end_that_is_gone_lacks_all_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "WORDS", {"v1/engine/elsewhere.py": ("def abort_requests",)})
    assert contract.missing() == ['"def abort_requests" in v1/engine/elsewhere.py']


def test_what_the_middleware_asks_of_the_front_end_is_named() -> None:
    """The words of attributes and utility calls that it uses of vLLM's, all of which stand in the contract."""
    source = (PACKAGE / "middleware.py").read_text()
    named = " ".join(word for words in contract.WORDS.values() for word in words)
    for name in ("engine_client", "vllm_config", "engine_core", "call_utility_async", "abort_requests"):
        assert name in source and name in named


def test_another_version_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KVCacheManager, "estimate_cached_tokens")
    monkeypatch.delattr(BlockPool, "touch")
    with pytest.raises(UserError) as refused:
        build({"policy": "turnstile"})
    message = str(refused.value)
    assert "KVCacheManager.estimate_cached_tokens, BlockPool.touch" in message and "\n" not in message
    assert contract.WRITTEN_FOR in message
    build({"policy": "fcfs"})  # stock needs none of it


def test_prefix_caching_off_is_refused_in_one_line() -> None:
    class Config:
        cache_config = CacheConfig(block_size=16, enable_prefix_caching=False)

    with pytest.raises(UserError, match="prefix caching is off"):
        contract.check(Config())


def test_the_classes_that_are_named_are_the_engines() -> None:
    scheduler = build({"policy": "turnstile"})
    pool = scheduler.kv_cache_manager.block_pool
    for thing, owner in (
        (scheduler, Scheduler), (scheduler.kv_cache_manager, KVCacheManager), (pool, BlockPool),
        (scheduler.kv_cache_manager.coordinator, KVCacheCoordinator),
        (pool.free_block_queue, FreeKVCacheBlockQueue), (pool.blocks[1], KVCacheBlock),
        (scheduler.waiting, RequestQueue), (scheduler.kv_cache_manager.get_blocks("x"), KVCacheBlocks),
    ):  # fmt: skip
        assert isinstance(thing, owner)
        assert all(hasattr(thing, name) for name in named(owner))
