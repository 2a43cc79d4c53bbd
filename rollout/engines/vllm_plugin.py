"""What this project changes inside a vLLM process that it started: weights on CPU that can be replaced, above all.

vLLM on CPU repacks linear weights into closures and empties the parameters (``dispatch_cpu_unquantized_gemm``), so a
later weight update reports success and leaves them stale. Here the weight stays and every product reads it.

``register`` is a ``vllm.general_plugins`` entry point: vLLM calls it in each of its processes, also in those that have
nothing to do with us. It therefore does nothing unless ``TURNSTILE_ENGINE`` is set, which only our engines do: to the
process id of their owner.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

ACTIVE = "TURNSTILE_ENGINE"
LOG = "TURNSTILE_ENGINE_LOG"
ADAPTER_SERVER = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # vLLM's own; set where adapters come over HTTP
TRANSFER = "turnstile_file"  # the name of our weight transfer back end in vLLM


def register() -> None:
    """Called by vLLM in every process; vLLM may call it more than once."""
    owner = os.environ.get(ACTIVE)
    if not owner:
        return
    if owner != str(os.getpid()):
        die_with_parent(int(owner))
        if os.environ.get(LOG):
            log_to(os.environ[LOG])
            print_to(os.environ[LOG])
    keep_weights()
    sample_eagerly()
    register_transfer()
    if os.environ.get(ADAPTER_SERVER):
        read_adapters_once()


def keep_weights() -> None:
    """Make vLLM's linear layers on CPU read their parameter at every call. Nothing is changed on other platforms."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm
    if packing.__module__ == __name__:
        return

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            packing(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def register_transfer() -> None:
    """Make our weight transfer back end known under its name."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER, "rollout.engines.vllm_transfer", "FileTransfer")


def sample_eagerly() -> None:
    """Take torch.compile off two small functions of vLLM's sampler on CPU: it costs the first request seconds."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    for module, name in ((sampler, "batched_count_greater_than"), (topk_topp_sampler, "compiled_random_sample")):
        function = getattr(module, name)
        setattr(module, name, getattr(function, "_torchdynamo_orig_callable", function))


def read_adapters_once() -> None:
    """Keep vLLM's server from reading an adapter anew at every step.

    Its end point notes ``load_inplace`` for all later requests, whose every step then loads (vllm-project/vllm#33791).
    """
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Manager

    apply = Manager._apply_adapters
    if apply.__module__ == __name__:
        return

    def _apply_adapters(self: Manager, lora_requests: set[LoRARequest]) -> None:
        for request in lora_requests:
            request.load_inplace = False
        apply(self, lora_requests)

    Manager._apply_adapters = _apply_adapters


def die_with_parent(owner: int) -> None:
    """End this process within seconds of its parent or its owner: a killed trainer must leave no engine behind.

    The owner may have gone before this process had imported so far, and its parent then is another already.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and Path(f"/proc/{owner}").exists():
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="turnstile-parent", daemon=True).start()


def log_to(path: str) -> None:
    """Send vLLM's messages in this process to a file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s:%(lineno)d %(message)s"))
    logger = logging.getLogger("vllm")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def print_to(path: str) -> None:
    """Send what a child process prints, from Python and from C++, to a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
