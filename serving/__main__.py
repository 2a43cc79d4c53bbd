"""python -m serving checkpoint=DIR: a checkpoint behind vLLM's own OpenAI-compatible server."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rollout import checkpoint as checkpoints
from rollout.config import PROGRAM_SCHEDULER
from rollout.errors import UserError
from rollout.hydra import conf_dir, guarded, run_command, to_object
from rollout.scheduling.options import Options
from serving import config as schema
from serving.command import server_command
from serving.parsers import OURS, Parsers, choose
from serving.plan import Plan, plan
from serving.server import Server, base_url, bound

if TYPE_CHECKING:
    from serving.replicas import Replicas

schema.register()

EXAMPLES = """\
curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "What is 12 * 34?"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="-")
client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": "What is 12 * 34?"}}]{modes})
"""
MODES = ',\n    extra_body={"chat_template_kwargs": {"reasoning": "auto"}}'  # auto, always or never


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="serving")
@guarded
def run(composed: DictConfig) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop the server and all of its processes."""
    config = to_object(composed)
    config.check()
    serve(config, Console(highlight=False, soft_wrap=True))


def serve(config: schema.ServingConfig, console: Console) -> None:
    """Check everything that can be checked cheaply, then start vLLM and stay until told to stop."""
    checkpoint = checkpoints.read(config.checkpoint)
    cpu = runs_on_cpu()
    listener = bound(config.host, config.port)
    config = dataclasses.replace(config, port=listener.getsockname()[1])
    parsers = choose_parsers(config, checkpoint)
    name = config.name or checkpoint.path.name
    run_dir = Path(config.run_dir).resolve()
    template = None
    if parsers.template is not None:
        template = run_dir / "chat_template.jinja"
        run_dir.mkdir(parents=True, exist_ok=True)
        template.write_text(parsers.template, encoding="utf-8")
    url = base_url(config.host, config.port)
    plans = [plan(config, checkpoint.path, run_dir, replica) for replica in range(config.replicas)]
    console.print(f"checkpoint  {checkpoint.path} ({checkpoint.model_type}), served as {name}", markup=False)
    console.print(f"parsers     tool calls: {parsers.tool or 'none'}, reasoning: {parsers.reasoning or 'none'}")
    if not checkpoint.template:
        console.print("            no chat template: only /v1/completions will answer")
    lines = [scheduler_line(each) for each in plans]
    for each, line in zip(plans, lines, strict=True):
        console.print(f"scheduler   {line}", markup=False)
        console.print(f"engine log  {each.log}", markup=False)

    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, signal.default_int_handler)
    # nobind: vLLM would bind its threads to core 0 and reserve core 1, which slows every second process of a machine
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM closes idle connections after 5 s, when clients give them up too: a request after such a pause may get lost
    environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")

    def launch(each: Plan, host: str, port: int) -> Server:
        own = dataclasses.replace(config, host=host, port=port, scheduler=each.scheduler)
        command = server_command(own, checkpoint.path, name, parsers, template, cpu=cpu, replica=each.replica)
        return Server(command, environment | each.variables, base_url(host, port), each.log)

    server: Server | Replicas
    if config.replicas == 1:
        listener.close()
        server = launch(plans[0], config.host, config.port)
    else:
        from serving.replicas import Replicas  # the libraries of the router come with vLLM

        launches = [functools.partial(launch, each) for each in plans]
        server = Replicas(launches, listener, config.start_timeout_s, console)
    ready = False
    try:
        wait_ready(server, config.start_timeout_s, console)
        ready = True
        console.print(f"serving     {url}/v1  (Ctrl-C stops it)\n")
        console.print(
            EXAMPLES.format(url=url, name=name, modes=MODES if parsers.reasoning == OURS else ""), markup=False
        )
        server.wait()
    except KeyboardInterrupt:
        if not ready:
            raise
    finally:
        server.stop(config.stop_timeout_s)
    console.print("stopped")


def scheduler_line(each: Plan) -> str:
    """What orders requests, and what it starts from. Raises UserError for options that its engine would refuse."""
    scheduler = each.scheduler
    if scheduler.cls != PROGRAM_SCHEDULER:
        return scheduler.cls or "vLLM's own"
    os.environ.update(each.variables)  # where the options' paths are
    options = Options.read(scheduler.options)
    known = f", with the tool latencies of {options.latencies}" if options.latencies else ""
    return options.policy + known + (f", metrics on port {options.metrics_port}" if options.metrics_port else "")


def wait_ready(server: Server | Replicas, timeout: float, console: Console) -> None:
    """Show that time passes, and how much of it there is, until the server answers."""
    columns = (
        SpinnerColumn(),
        TextColumn("starting vLLM"),
        TimeElapsedColumn(),
        TextColumn("of at most {task.total:.0f} s"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=timeout)
        server.wait_ready(timeout, lambda seconds: progress.update(task, completed=seconds))


def choose_parsers(config: schema.ServingConfig, checkpoint: checkpoints.Checkpoint) -> Parsers:
    """The checkpoint's parsers, with what the settings name instead."""
    parsers = choose(checkpoint.template, checkpoint.model_type, checkpoint.added_tokens)
    if config.tool_parser != "auto":
        parsers = dataclasses.replace(parsers, tool=_named(config.tool_parser))
    if config.reasoning_parser not in ("auto", parsers.reasoning):
        parsers = dataclasses.replace(parsers, reasoning=_named(config.reasoning_parser), template=None)
    return parsers


def _named(parser: str) -> str | None:
    return None if parser == "none" else parser


def runs_on_cpu() -> bool:
    """Whether the vLLM that is installed is the CPU build; known without importing it, which takes ten seconds."""
    installed = {package for package in ("vllm", "vllm-cpu") if _version(package)}
    if not installed:
        raise UserError("vLLM is not installed; install turnstile-rl[gpu], or turnstile-rl[cpu] where there is no GPU")
    return installed == {"vllm-cpu"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    run_command(run)


if __name__ == "__main__":
    main()
