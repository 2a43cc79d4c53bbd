"""The scheduler plug-in for stock vLLM: ``--scheduler-cls rollout.scheduling.vllm_plugin.program_scheduler``.

Options come by ``--additional-config '{"turnstile": {"policy": "turnstile"}}'`` (``options.py``). Until the first
program appears the scheduler is vLLM's own, queue and all.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler

from rollout.errors import UserError
from rollout.scheduling import contract
from rollout.scheduling.options import CLAIRVOYANT, Options
from rollout.scheduling.policies import STOCK
from rollout.scheduling.program_scheduler import ProgramMixin


class ProgramScheduler(ProgramMixin, Scheduler):
    """Over vLLM's synchronous scheduler."""


class AsyncProgramScheduler(ProgramMixin, AsyncScheduler):
    """Over vLLM's asynchronous one: hand-driven in tests on CPU, where vLLM forces it off. Not run on GPU."""


def program_scheduler(*, simulated: bool = False, **kwargs: Any) -> SchedulerInterface:
    """Build the scheduler that vLLM asks for, with the keywords that it gives. ``simulated``: the future is known.

    Raises:
        UserError: an unknown policy or option, prefix caching off, or a vLLM whose internals differ.
    """
    config = kwargs["vllm_config"]
    options = Options.read(config.additional_config)
    if options.policy == CLAIRVOYANT and not simulated:
        raise UserError(
            f"scheduler options: {CLAIRVOYANT} knows the future: it runs in the simulator only; try turnstile"
        )
    asynchronous = config.scheduler_config.async_scheduling
    if options.policy in STOCK:
        config.scheduler_config.policy = options.policy
        return (AsyncScheduler if asynchronous else Scheduler)(**kwargs)
    contract.check(config)
    scheduler = (AsyncProgramScheduler if asynchronous else ProgramScheduler)(**kwargs)
    scheduler.adopt(options)
    return scheduler
