"""vLLM behind the Engine protocol: what the three members share, and the choice between them."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rollout.checkpoint import check_weights, read_config
from rollout.config import PROGRAM_SCHEDULER, VllmConfig
from rollout.engines import Engine, Generation, vllm_plugin
from rollout.engines.mailbox import Request
from rollout.engines.vllm_plugin import ACTIVE, LOG, TRANSFER
from rollout.errors import UserError

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams


_starting = threading.Lock()  # the environment is the whole process's


def build(config: VllmConfig, model_dir: str, *, log_path: Path | None = None) -> Engine:
    """Start the member that ``config.mode`` names on a Hugging Face folder; what it prints goes to ``log_path``."""
    if config.mode == "in_process":
        from rollout.engines.vllm_in_process import InProcessEngine

        return InProcessEngine(config, model_dir, log_path)
    from rollout.engines.fleet import Fleet
    from rollout.engines.member import member_class

    # A server that runs already is its owner's to start again.
    alone = config.url is not None or (config.replicas == 1 and config.restarts == 0 and config.devices is None)
    return (member_class(config) if alone else Fleet)(config, model_dir, log_path)


def check_model(model_dir: str) -> int:
    """The size of the model's vocabulary, or one line that says what is wrong with the folder."""
    fields = read_config(Path(model_dir))
    check_weights(Path(model_dir))
    return int(fields.get("text_config", fields)["vocab_size"])


def last_words(log_path: Path | None) -> str:
    """The last line of an engine's log that says something, for the message of its death."""
    if log_path is None or not log_path.exists():
        return "no log was kept"
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines()[-200:]]
    errors = [line for line in lines if re.search(r"(Error|Exception): \S", line)]
    return f"{(errors or lines or ['its log is empty'])[-1][-300:]} (see {log_path})"


def engine_arguments(config: VllmConfig, model_dir: str) -> dict[str, Any]:
    """vLLM's engine arguments, named as in ``EngineArgs``. Does not import vLLM.

    Log-probs are those of the distribution that was sampled from (``processed_logprobs``), and no default of the
    checkpoint's generation_config may change that distribution. Chunked prefill is off where requests bring seeds:
    vLLM 0.32's CPU runner dies on a seeded request in a chunked prefill (v1/worker/gpu_model_runner.py).
    """
    import torch

    arguments: dict[str, Any] = {
        "model": model_dir,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_model_len),
        "block_size": config.block_size,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "additional_config": dict(config.scheduler_options),
        "weight_transfer_config": {"backend": TRANSFER if config.transfer == "file" else config.transfer},
    }
    if config.scheduler_cls is not None:
        arguments["scheduler_cls"] = config.scheduler_cls
    if config.scheduler_cls not in (None, PROGRAM_SCHEDULER):  # ours is there; importing it imports vLLM
        try:
            pkgutil.resolve_name(config.scheduler_cls)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"engine.scheduler_cls: cannot import {config.scheduler_cls} ({error})") from error
    if torch.cuda.is_available():  # not run on GPU
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        arguments["enable_chunked_prefill"] = not config.deterministic
        arguments["enable_sleep_mode"] = config.sleep_level > 0
    else:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        arguments["enable_chunked_prefill"] = False
    return arguments | dict(config.extra)


def variables(log_path: Path | None) -> dict[str, str]:
    """Environment variables under which vLLM must be imported and its processes started."""
    wanted = {
        ACTIVE: str(os.getpid()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two engines on one machine share the first core
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPU: no worker process beside the core
        "VLLM_NO_USAGE_STATS": "1",
    }
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        wanted |= {LOG: str(log_path.resolve()), "VLLM_CONFIGURE_LOGGING": "0"}
    return wanted


def of_launcher(name: str) -> bool:
    """Whether torchrun set this variable for the trainer: an engine that reads it would join the wrong group."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return name in ranks or name.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))


@contextlib.contextmanager
def environment(log_path: Path | None, own: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Those variables, and the engine's ``own``, for the length of its start, with its noise in the log.

    One start at a time: the others wait.

    Afterwards everything is as before, also what vLLM set for workers of its own (LOCAL_WORLD_SIZE, LD_PRELOAD, …): it
    would mislead the trainer and its children. What vLLM reads later in this process (VLLM_…) stays.
    """
    wanted = {**variables(log_path), **own}
    with _starting, environment_kept(wanted):
        for name in [*filter(of_launcher, os.environ)]:
            del os.environ[name]
        os.environ.update(wanted)
        if log_path is None:
            yield
        else:
            vllm_plugin.log_to(wanted[LOG])
            with stderr_to(log_path), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield


@contextlib.contextmanager
def environment_kept(drop: Iterable[str] = ()) -> Iterator[None]:
    """Undo what vLLM does to the environment; what it reads later itself (VLLM_…) stays, unless ``drop`` names it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for key in set(os.environ) - set(before):
            if key in drop or not key.startswith("VLLM_"):
                del os.environ[key]
        os.environ.update(before)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn vLLM's refusal of a configuration (a pydantic report of many lines) into one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower() and "validation error" not in line), lines[-1])
        raise UserError(f"engine: vLLM refuses these settings: {reason}") from error


@contextlib.contextmanager
def stderr_to(path: Path) -> Iterator[None]:
    """Send what C++ writes to the terminal while an engine starts to its log."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with path.open("a") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


def check_prompt(ids: list[int], room: int, max_model_len: int, vocab_size: int) -> None:
    """Refuse what would kill or silently bend the engine: prompts without room, ids outside the vocabulary."""
    if not ids:
        raise UserError("engine: an empty prompt; give at least one token")
    if len(ids) + room > max_model_len:
        raise UserError(
            f"engine.max_model_len: {max_model_len} leaves no room after a prompt of {len(ids)} tokens; raise it"
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(f"engine: token id {max(ids)} or {min(ids)} lies outside the vocabulary of {vocab_size}")


def sampling_fields(request: Request) -> dict[str, Any]:
    """vLLM's sampling parameters. Only ``stop_token_ids`` and ``max_tokens`` end a generation.

    ``tool`` and ``last_turn`` travel as ``extra_args`` to the scheduler, beside the program's id as ``session_id``.
    """
    sampling = request.sampling
    extra: dict[str, Any] = {}
    if request.tool is not None:
        extra["tool"] = request.tool
    if request.last_turn:
        extra["last_turn"] = True
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "extra_args": extra or None,
    }


# One greedy token that nobody reads, and the log-probs of the prompt: vLLM gives these at temperature 1.
SCORING_FIELDS: dict[str, Any] = {
    "max_tokens": 1,
    "temperature": 0.0,
    "prompt_logprobs": 0,
    "ignore_eos": True,
    "detokenize": False,
}


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """The object for engines that are called without HTTP: one output at the end, in vLLM's cheapest format."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**fields, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True)


def generation(output: CompletionOutput, cached_tokens: int) -> Generation:
    """A finished vLLM output; its weight versions are the numbers that ``update_weights`` stamped."""
    versions: list[int] = []
    for span in output.weight_versions or []:
        versions += [int(span.version)] * (span.end - span.start)
    extras = {} if output.routed_experts is None else {"routed_experts": output.routed_experts}
    return Generation(
        ids=list(output.token_ids),
        logprobs=list(output.logprobs.logprobs),
        finish=output.finish_reason,
        versions=versions,
        cached_tokens=cached_tokens,
        extras=extras,
    )
