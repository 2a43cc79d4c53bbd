"""What cannot work is refused before anything starts: one line that names the key and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from rollout.errors import UserError
from rollout.hydra import EXPECTED, conf_dir, one_line, to_object
from training.config import GROUPS, TrainingConfig, register

REFUSED = {
    "steps=0": "steps: 0 must be at least 1",
    "sampling.top_p=0.9": "sampling.top_p: training samples the full distribution, so 0.9 is refused; leave it at",
    "sampling.top_k=50": "sampling.top_k: training samples the full distribution, so 50 is refused; leave it at",
    "sampling.min_p=0.1": "sampling.min_p: training samples the full distribution, so 0.1 is refused; leave it at",
    "sampling.temperature=0": "sampling.temperature: training cannot sample greedily; give a value above 0",
    "sampling.temperature=-1": "sampling.temperature: -1.0 must not be negative",
    "correction=tis": "correction: corrects from .*; add anchor=recomputed or take correction=none",
    "correction=token_mask": "correction: corrects from .*; add anchor=recomputed or take correction=none",
    "budget.samples=1": "budget.samples: a group of one teaches nothing; give at least 2",
    "advantage=rloo budget.samples=1": "budget.samples: a group of one teaches nothing; give at least 2",
    "batch.max_tokens=511": "batch.max_tokens: 511 is shorter than engine.max_model_len=512: a whole sequence must fit",
    "limits.max_new_tokens=512": "limits.max_new_tokens: 512 leaves no room for a prompt in engine.max_model_len=512",
    "max_staleness=-1": "max_staleness: -1 must not be negative",
    "max_staleness=2 engine.sleep_level=1": "max_staleness: 2 plays while it trains, so the engine cannot sleep",
    "engine=vllm_http engine.replicas=2 +engine.extra.port=8001": "engine.extra.port: the replicas cannot share it",
    "engine.sleep_level=3": "engine.sleep_level: 3 is not 0, 1 or 2",
    "algorithm=tppo engine.sleep_level=1 engine.keep_cache=true": "engine.keep_cache: .* gives up its cache; leave",
    "max_staleness=1": "correction: max_staleness=1 trains on an older policy's episodes; add correction=tis",
    "algorithm=tppo max_staleness=1": "max_staleness: 1 plays rounds ahead.*window=complete; others are",
    "algorithm=tppo window.length=129": "window.length: 129 is larger than limits.max_new_tokens=128; lower it, or",
    "algorithm=tppo window.length=0": "window.length: 0 must be at least 1",
    "algorithm=tppo window.length=10 window.max_windows=13": "window.max_windows: 13 drops every episode .* need 14",
    "algorithm=tppo selection=dynamic_sampling": "selection: dynamic_sampling judges whole groups, and egae trains",
    "window=truncated": "correction: whole episodes of truncated windows are partly of older policies; add correction",
    "algorithm=ppo window=truncated": "correction: whole episodes of truncated windows are partly of older policies;",
    "engine.keep_cache=true": "engine.keep_cache: no episode outlives a weight update; add window=truncated",
    "window=over_provisioned window.spare=-1": "window.spare: -1.0 must not be negative",
    "+trainer.save_steps=3": "trainer.save_steps: is not for users; allowed are .*report_to.*",
    "model.dtype=float16": "model.dtype: 'float16' is not float32 or bfloat16",
    "batch.prompts=0": "batch.prompts: 0 must be at least 1",
    "batch.minibatches=99": "batch.minibatches: 99 exceeds batch.prompts",
    "batch.aggregation=mean": "batch.aggregation: 'mean' is not one of token, sequence, constant",
    "anchor.kind=engine": "anchor.kind: 'engine' is not behaviour or recomputed",
    "lora=lora lora.rank=0": "lora.rank: 0 must be at least 1",
    "lora=lora lora.sync=both": "lora.sync: 'both' is not merged or adapter",
    "lora=lora lora.sync=adapter lora.rank=513": "lora.rank: 513: vLLM takes at most 512; lower it, or take lora.sync=",
    "lora=lora lora.sync=adapter engine.sleep_level=2": "engine.sleep_level: 2 drops the weights, which lora.sync=ad",
    "lora=lora lora.sync=adapter engine=vllm_process engine.restarts=0 engine.transfer=ipc": "engine.transfer: ipc: ",
    "lora=lora lora.sync=adapter engine=transformers": "lora.sync: adapter: .*; take lora.sync=merged, or engine=vllm",
    "warm_start=sft warm_start.steps=0": "warm_start.steps: 0 must be at least 1; warm_start=none skips it",
    "warm_start=sft warm_start.optimizer=sgd": "warm_start.optimizer: 'sgd' is not adamw_torch or muon",
    "checkpoint.every=0": "checkpoint.every: 0 must be at least 1",
    "checkpoint.keep_last=0": "checkpoint.keep_last: 0 must be at least 1",
    "evaluation.every=0": "evaluation.every: 0 must be at least 1, or null",
    "engine=vllm_http engine.deterministic=true": "engine.deterministic: needs engine.mode=in_process for",
    "algorithm=tppo engine=vllm_process engine.deterministic=true": "engine.deterministic: what a window holds",
    "engine=transformers engine.deterministic=true": "engine.deterministic: .*; use engine=vllm",
    "engine.url=http://x": "engine.url: needs engine.mode=http, not in_process",
    "limits.max_tool_calls=-1": "limits.max_tool_calls: -1 must not be negative",
    "scheduler=turnstile engine=transformers": "scheduler: only vLLM has a choice; take engine=vllm",
    "scheduler=turnstile engine=vllm_http engine.url=http://x": "scheduler: the server at engine.url chose its own",
    "scheduler=turnstile engine.deterministic=true": "engine.deterministic: turnstile decides by the clock; take sch",
    "scheduler=turnstile scheduler.options.turnstile.policy=clairvoyant": "scheduler: clairvoyant knows the future: ",
    "scheduler=turnstile scheduler.options.turnstile.policy=x": "scheduler options: unknown policy 'x'; there are: f",
    "scheduler=turnstile scheduler.options.turnstile.max_pinned=2": "scheduler options: max_pinned=2 must be a number",
    "scheduler=plas +scheduler.options.turnstile.k=2": "scheduler options: plas knows no 'k'; there are: infer_prog",
    "scheduler=program_cap": r"scheduler\.options\.turnstile\.cap: required and not given; add scheduler\.options\.",
    "scheduler=turnstile scheduler.options.turnstile.latencies=no.json": r"tool latencies no\.json: cannot be read",
    "scheduler=turnstile scheduler.options.turnstile.save_latencies=x": r"scheduler\.options.*: training keeps them in",
    "budget=knapsack budget.low=0": r"budget\.low: 0 must be at least 2: a prompt that gets none is never judged",
    "budget=bayes_knapsack budget.high=4": r"budget\.samples: 8 must be from budget\.low=0 to budget\.high=4",
    "budget=bayes_knapsack budget.cost=money": r"budget\.cost: money must be rollouts or tokens",
    "reward=otc reward.form=dpo": r"reward\.form: 'dpo' is not grpo or ppo",
    "reward=otc reward.optimum=batch": r"reward\.optimum: 'batch' is not history or group",
    "reward=otc reward.alpha=0": r"reward\.alpha: 0\.0 must be above 0",
    "reward=otc +reward.prices.search=-1": r"reward\.prices: \{'search': -1\.0\} must not be negative",
    "reward=adacot reward.alpha_over=-1": r"reward\.alpha_over: -1\.0 must not be negative",
    "reward=adacot reward.labels=judge": r"reward\.labels: 'judge' is not task or self",
    "reward=adacot reward.threshold=1": r"reward\.threshold: 1\.0 must be between 0 and 1",
    "advantage=decoupled budget.samples=1": r"budget\.samples: a group of one teaches nothing; give at least 2",
    "reasoning.told_always=0.6 reasoning.told_never=0.6": r"reasoning\.told_always: .* at most 1 together",
    "task.told=2": r"task\.told: 2\.0 must be a share, from 0 to 1",
    "task.operators=/": r"task.operators: '/' may hold only \+ - \*",
}


def checked(*overrides: str) -> TrainingConfig:
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg: TrainingConfig = to_object(compose("training", overrides=["run_dir=unused", *overrides]))
    cfg.check()
    return cfg


@pytest.mark.parametrize("overrides", REFUSED)
def test_each_refusal_is_one_line_that_names_key_and_remedy(overrides: str) -> None:
    with pytest.raises(EXPECTED, match=REFUSED[overrides]) as refused:
        checked(*overrides.split())
    line = one_line(refused.value)
    assert line == str(refused.value) and "\n" not in line and isinstance(refused.value, UserError)


@pytest.mark.parametrize(
    "overrides",
    [
        "correction=tis anchor=recomputed",
        "sampling.temperature=0.7",
        "batch.max_tokens=512",
        "limits.max_new_tokens=511",
        "+trainer.report_to=[] +trainer.gradient_checkpointing=true",
    ],
)
def test_what_works_is_let_through(overrides: str) -> None:
    checked(*overrides.split())


def test_members_know_the_classes_that_read_them_and_these_their_settings() -> None:
    """A setting that nobody reads, or a class that is not there, would show only at the end of a start."""
    import inspect
    from dataclasses import fields
    from pkgutil import resolve_name

    for group, members in GROUPS.items():
        for name, schema in members.items():
            target: Any = getattr(schema, "_target_", None)
            if target is not None:
                parameters = inspect.signature(resolve_name(target)).parameters
                settings = {field.name for field in fields(schema)} - {"_target_"}
                assert settings <= set(parameters), f"{group}/{name}"


def test_a_budget_that_means_nothing_to_a_critic_is_said_at_start() -> None:
    (note,) = checked("algorithm=tppo", "budget=bayes_knapsack").notes()
    assert note.startswith("budget: ") and "advantage=group" in note
    assert checked("algorithm=knapsack_grpo").notes() == checked("algorithm=tppo").notes() == []


def test_a_price_that_normalisation_cancels_is_said_at_start() -> None:
    (note,) = checked("reward=adacot").notes()
    assert note.startswith("reward: ") and "advantage=decoupled" in note
    for kept in ("advantage=decoupled", "advantage.normalize=false", "algorithm=ppo"):
        assert checked("reward=otc_adacot", kept).notes() == []
