"""Options: what is good is taken, and whatever is bad is one line that names it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import UserError
from rollout.scheduling.options import Options
from rollout.scheduling.policies import POLICIES, STOCK, FixedTtl, ProgramCap
from rollout.scheduling.turnstile import Turnstile

BAD: list[tuple[dict[Any, Any], str]] = [
    ({"policy": "lru"}, "'lru'"),
    ({"policy": 3}, "3"),
    ({"policy": ["turnstile"]}, "turnstile"),
    ({"policy": ""}, "''"),
    ({"polcy": "turnstile"}, "'polcy'"),
    ({"settings": {"k": 1}}, "'settings'"),
    ({1: 2, "x": 3}, "1"),
    ({"self": 1}, "'self'"),
    ({"policy": "fcfs", "k": 1.0}, "'k'"),
    ({"policy": "fixed_ttl", "k": 1.0}, "'k'"),
    ({"policy": "continuum", "args": 1}, "'args'"),
    ({"max_pinned": 0}, "max_pinned=0"),
    ({"max_pinned": 1.01}, "max_pinned=1.01"),
    ({"max_pinned": math.nan}, "max_pinned=nan"),
    ({"max_pinned": True}, "max_pinned=True"),
    ({"max_pinned": "half"}, "max_pinned='half'"),
    ({"max_pinned": []}, "max_pinned=[]"),
    ({"infer_programs": "yes"}, "infer_programs='yes'"),
    ({"infer_programs": 1}, "infer_programs=1"),
    ({"metrics_port": "9100"}, "metrics_port='9100'"),
    ({"metrics_port": -1}, "metrics_port=-1"),
    ({"metrics_port": 70_000}, "metrics_port=70000"),
    ({"metrics_port": True}, "metrics_port=True"),
    ({"metrics_port": 91.5}, "metrics_port=91.5"),
    ({"latencies": 5}, "latencies=5"),
    ({"latencies": ""}, "latencies=''"),
    ({"metrics_path": {}}, "metrics_path={}"),
    ({"save_latencies": []}, "save_latencies=[]"),
    ({"save_latencies": "no/such/folder/latencies.json"}, "no such folder"),
    (
        {"metrics_path": "no/such/folder/numbers.json"},
        "metrics_path=no/such/folder/numbers.json: there is no such folder",
    ),
    ({"metrics_path": str(Path(__file__).parent)}, "is a folder"),
    ({"metrics_path": f"{__file__}/numbers.json"}, "no such folder"),
    ({"latencies": "$TURNSTILE_NEVER_SET"}, "no $TURNSTILE_NEVER_SET"),
    ({"metrics_path": "/tmp/${TURNSTILE_NEVER_SET}.json"}, "no ${TURNSTILE_NEVER_SET}"),
    ({"policy": "program_cap"}, "needs cap"),
    ({"policy": "program_cap", "cap": 0}, "cap=0"),
    ({"policy": "program_cap", "cap": 1.5}, "cap=1.5"),
    ({"policy": "program_cap", "cap": "8"}, "cap='8'"),
    ({"policy": "program_cap", "cap": 8, "idle_limit": 0}, "idle_limit=0"),
    ({"policy": "fixed_ttl", "ttl": -1}, "ttl=-1"),
    ({"policy": "fixed_ttl", "ttl": "2"}, "ttl='2'"),
    ({"policy": "fixed_ttl", "ttl": math.nan}, "ttl=nan"),
    ({"k": None}, "k=None"),
    ({"k": "5"}, "k='5'"),
    ({"k": True}, "k=True"),
    ({"k": [1]}, "k=[1]"),
    ({"k": 0}, "k=0"),
    ({"express_share": 1.5}, "express_share=1.5"),
]


def made(given: Any) -> None:
    options = Options.read({"turnstile": given})
    if options.policy not in STOCK:
        options.build()


@pytest.mark.parametrize(("given", "named"), BAD, ids=[str(given) for given, _ in BAD])
def test_bad_options_are_one_line_that_names_them(given: dict[Any, Any], named: str) -> None:
    with pytest.raises(UserError) as refused:
        made(given)
    assert named in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("whole", [3, [], "turnstile", None, True])
def test_options_that_are_no_mapping(whole: Any) -> None:
    with pytest.raises(UserError, match="no mapping"):
        Options.read({"turnstile": whole})


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)
keys = ["policy", "infer_programs", "max_pinned", "metrics_port", "latencies", "metrics_path", "k", "cap", "ttl", "x"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(keys), json | st.sampled_from([*POLICIES, *STOCK]), max_size=4))
def test_any_json_is_taken_or_refused(given: dict[str, Any]) -> None:
    try:
        made(given)
    except UserError as refused:
        assert str(refused).startswith("scheduler options") or "no mapping" in str(refused)


def test_defaults() -> None:
    empty: tuple[Any, ...] = (None, {}, {"other": 1}, {"turnstile": {}}, [], "x")
    for nothing in empty:
        options = Options.read(nothing)
        assert options == Options() and isinstance(options.build(), Turnstile)
    assert Options.read({"turnstile": {"policy": None, "latencies": None, "metrics_port": None}}) == Options()


def test_what_is_given_arrives(tmp_path: Path) -> None:
    options = Options.read(
        {
            "turnstile": {
                "policy": "program_cap", "cap": 3, "idle_limit": 7, "infer_programs": True, "max_pinned": 0.5,
                "latencies": "a.json", "save_latencies": str(tmp_path / "b.json"), "metrics_path": "c.json",
                "metrics_port": 0,
            }
        }
    )  # fmt: skip
    assert (options.latencies, options.metrics_path) == (Path("a.json"), Path("c.json"))
    assert (options.infer_programs, options.max_pinned, options.metrics_port) == (True, 0.5, 0)
    policy = options.build()
    assert isinstance(policy, ProgramCap) and (policy.cap, policy.idle_limit) == (3, 7)
    never = Options.read({"turnstile": {"policy": "fixed_ttl", "ttl": math.inf}}).build()
    assert isinstance(never, FixedTtl) and never.ttl == math.inf


def test_paths_may_hold_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/tmp/$HOME")  # not expanded twice
    monkeypatch.setenv("NOWHERE", "")
    given = {"latencies": "${SCRATCH}/a.json", "metrics_path": "$NOWHERE", "save_latencies": None}
    options = Options.read({"turnstile": given})
    assert options == Options(latencies=Path("/tmp/$HOME/a.json"))


@pytest.mark.parametrize("name", ["metrics_path", "save_latencies"])
def test_a_folder_that_may_not_be_written_is_refused(name: str) -> None:
    """/run is one for ordinary users. Root may write everywhere: it plays one here."""
    user = os.geteuid()
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(UserError) as refused:
                Options.read({"turnstile": {name: f"{folder}/a.json"}})
        finally:
            os.seteuid(user)
    assert f"{name}={folder}/a.json: {folder} cannot be written" in str(refused.value)
    assert "/tmp" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_built(policy: str) -> None:
    extra = {"cap": 1} if policy == "program_cap" else {}
    assert type(Options.read({"turnstile": {"policy": policy, **extra}}).build()) is POLICIES[policy]
