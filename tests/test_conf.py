"""Every file in conf/ composes in its root, and the commands answer at once, with errors on one line."""

import inspect
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rollout import config as rollout_config
from rollout.hydra import conf_dir
from rollout.scheduling import config as scheduling_config
from serving import config as serving_config
from training import config as training_config
from training.members import RlooConfig

CONF = Path(conf_dir())
ROOTS = sorted(file.stem for file in CONF.glob("*.yaml"))
# Which root a group belongs to is read from the root's own defaults: a group that none names has no reader.
GROUPS = {root: re.findall(r"^  - (\w+):", (CONF / f"{root}.yaml").read_text(), re.M) for root in ROOTS}
MEMBERS = sorted(str(file.relative_to(CONF).with_suffix("")) for file in CONF.glob("*/*.yaml"))
COMMANDS = ["training", "rollout.evaluate", "serving", "rollout.scheduling.simulator"]
# What only the user can say: a path of the data, of the model, of the checkpoint
GIVEN = {
    "task/gsm8k": ["task.path=x"],
    "task/dataset": ["task.path=x"],
    "task/custom": ["task._target_=x.Y"],
    "model/hf": ["model.path=x"],
    "scheduler/program_cap": ["scheduler.options.turnstile.cap=4"],
    "root/serving": ["checkpoint=x"],
}


@pytest.fixture(scope="module", autouse=True)
def schemas():
    rollout_config.register()
    scheduling_config.register()
    serving_config.register()
    training_config.register()


def composed(root: str, *overrides: str):
    from rollout.hydra import to_object

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_object(compose(root, overrides=["run_dir=unused", *GIVEN.get(f"root/{root}", []), *overrides]))


def test_every_group_is_read_by_a_root():
    read = {group for groups in GROUPS.values() for group in groups}
    assert {member.partition("/")[0] for member in MEMBERS} <= read


@pytest.mark.parametrize("root", ROOTS)
def test_roots_compose(root):
    composed(root)


@pytest.mark.parametrize("member", [member for member in MEMBERS if not member.startswith("experiment/")])
def test_every_member_composes_in_every_root_that_has_its_group(member):
    group, name = member.split("/")
    for root in (root for root in ROOTS if group in GROUPS[root]):
        composed(root, f"{group}={name}", *GIVEN.get(member, []))


@pytest.mark.parametrize("name", [member.partition("/")[2] for member in MEMBERS if member.startswith("experiment/")])
def test_experiments_pass_the_checks_across_groups(name):
    needs = ["task.path=x"] if re.search(r"/task: gsm8k", (CONF / "experiment" / f"{name}.yaml").read_text()) else []
    composed("training", f"experiment={name}", *needs).check()


def command(
    module: str, *arguments: str, cwd: Path = CONF.parent, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    line = [sys.executable, *options, "-m", module, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=cwd, check=False)


def wall_seconds(module: str, *arguments: str) -> float:
    start = time.monotonic()
    command(module, *arguments)
    return time.monotonic() - start


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]], ids=["help", "cfg"])
def test_help_and_configuration_come_at_once_without_torch_and_vllm(module, arguments):
    answered = command(module, *arguments, options=("-X", "importtime"))
    lines = [line for line in answered.stderr.splitlines() if not line.startswith("import time:")]
    assert answered.returncode == 0, lines
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in answered.stderr.splitlines()}
    assert "hydra" in packages
    assert not packages & {"torch", "vllm", "transformers", "trl", "datasets"}
    assert "run_dir" in answered.stdout
    # The best of three: another process may hold the cores.
    assert any(wall_seconds(module, *arguments) < 3 for _ in range(3))


@pytest.mark.parametrize(
    "module, arguments, line",
    [
        ("training", ["stepz=3"], r"error: stepz: unknown key; did you mean steps\?"),
        ("training", ["engine.max_seqs=3"], r"error: engine\.max_seqs: unknown key; .* mean engine\.max_num_seqs\?"),
        ("training", ["steps=many"], r"error: steps: .*'many'.*"),
        ("training", ["budget.samples=0"], r"error: budget\.samples: 0 must be at least 1.*"),
        ("training", ["loss=clipp"], r"error: loss=clipp: no such choice; there are: .*clip.*"),
        ("training", ["sampling.top_p=0.9"], r"error: sampling\.top_p: training samples the full distribution.*"),
        ("training", ["correction=tis"], r"error: correction: .*anchor=recomputed.*"),
        ("training", ["scheduler=turnstile", "scheduler.options.turnstile.kk=3"], r"error: .*kk: unknown key; .*"),
        ("rollout.evaluate", ["limits.max_turn=3"], r"error: limits\.max_turn: unknown key; .*\.max_turns\?"),
        ("rollout.evaluate", [], r"error: checkpoint: give checkpoint=DIR or url=.*"),
        ("rollout.evaluate", ["task=gsm8k", "checkpoint=x"], r"error: task\.path: required and not given.*"),
        ("rollout.evaluate", ["url=http://127.0.0.1:9", "task=dataset", "task.path=x", "task.verifier=no.such"],
         r"error: task\.verifier: .*no\.such.*"),
        ("serving", ["checkpoint=x", "port=http"], r"error: port: .*'http'.*"),
        ("serving", [], r"error: checkpoint: required and not given; add checkpoint=.*"),
        ("rollout.scheduling.simulator", ["workload=sessions"], r"error: trace: .* add trace=FILE"),
        ("rollout.scheduling.simulator", ["trace=no.jsonl"], r"error: trace: no\.jsonl: no such file; .*"),
        ("rollout.scheduling.simulator", ["workload=chats"], r"error: workload=chats: no such choice.*"),
        ("rollout.scheduling.simulator", ["hardware.peak=0"], r"error: hardware\.peak: 0\.0 must be .*"),
        ("rollout.scheduling.simulator", ["workload.concurrency=4"], r"error: workload: give rate .* or concurrency.*"),
        ("rollout.scheduling.simulator", ["scheduler.cls=no.such"], r"error: scheduler\.cls: no\.such: .*"),
    ],
)  # fmt: skip
def test_bad_configuration_is_one_line_and_exit_code_2(module, arguments, line, tmp_path):
    answered = command(module, *arguments, cwd=tmp_path)
    assert answered.returncode == 2, answered.stderr[-2000:]
    assert re.fullmatch(line, answered.stderr.strip()), answered.stderr
    assert not answered.stdout


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["run_dir=file"], r"error: run_dir: cannot make file \(File exists\); give another run_dir"),
        (["run_dir=file/run"], r"error: run_dir: cannot make file/run \(Not a directory\); give another run_dir"),
        (["run_dir=/proc/run"], r"error: run_dir: cannot make /proc/run \(.*\); give another run_dir"),  # nor root
        (["hydra.sweep.dir=file", "--multirun"],
         r"error: hydra\.sweep\.dir: cannot make file \(File exists\); give another hydra\.sweep\.dir"),
    ],
)  # fmt: skip
def test_a_directory_that_cannot_be_made_is_one_line_and_exit_code_2(arguments, line, tmp_path):
    (tmp_path / "file").touch()
    answered = command("rollout.evaluate", "url=http://127.0.0.1:9", *arguments, cwd=tmp_path)
    assert answered.returncode == 2, answered.stderr[-2000:]
    assert re.fullmatch(line, answered.stderr.strip()), answered.stderr
    assert not answered.stdout


def test_dry_run_prints_the_plan_and_refuses_what_cannot_fit(tmp_path):
    planned = command("training", "experiment=qwen3_8b_grpo_8xh100", "dry_run=true", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "GiB per GPU" in planned.stdout and "batch plan" in planned.stdout
    small = ("experiment=qwen3_8b_lora_8xh100", "node.gpu_memory_gib=16")
    refused = command("training", *small, "dry_run=true", cwd=tmp_path)
    assert refused.returncode == 2
    assert "GiB per GPU" in refused.stdout
    assert re.fullmatch(r"error: .* GiB too (much|little).*; .*", refused.stderr.strip()), refused.stderr


@pytest.mark.parametrize("experiment", [[], ["experiment=quickstart"]])
def test_a_loss_that_is_chosen_keeps_its_own_numbers(experiment):
    for name, schema in training_config.GROUPS["loss"].items():
        if name != "clip":
            assert composed("training", *experiment, f"loss={name}").loss == schema()
    assert composed("training", "algorithm=dapo").loss.clip_high == 0.28
    assert composed("training", "algorithm=dr_grpo", "advantage=rloo").advantage == RlooConfig()


@pytest.mark.parametrize("name", [x.partition("/")[2] for x in MEMBERS if x.startswith("scheduler/")])
def test_a_scheduler_is_spelt_out_with_its_own_defaults(name):
    """A member shows every number of its policy, and the constructor's own value of each."""
    from rollout.scheduling.options import Options
    from rollout.scheduling.policies import POLICIES, STOCK

    scheduler = composed("serving", f"scheduler={name}", *GIVEN.get(f"scheduler/{name}", [])).scheduler
    scheduler.check()
    assert scheduler.policy == (None if name in STOCK else name)
    if name in STOCK:
        return
    options = Options.read(scheduler.options)
    parameters = inspect.signature(POLICIES[name]).parameters
    assert options.settings.keys() == parameters.keys()
    defaults = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {k: options.settings[k] for k in defaults} == defaults
    general = {f.name: getattr(options, f.name) for f in fields(Options) if f.name not in ("policy", "settings")}
    assert general == {name: getattr(Options(), name) for name in general}
    assert scheduler.options["turnstile"].keys() == {"policy", *general, *parameters}


def test_an_experiment_may_name_its_run_directory():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("training", overrides=["experiment=quickstart"]).run_dir == "outputs/quickstart"
