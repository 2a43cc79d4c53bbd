"""What a request says of its program, and the page of metrics; no server."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.replica_metrics import merged
from serving.router import ONE_SERVERS_STATE, Turn, read_turn

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("header", "body", "turn"),
    [
        (None, {"prompt": "x"}, Turn(None)),
        ("h", {"prompt": "x"}, Turn("h")),
        ("h", {"session_id": "b"}, Turn("b")),
        ("h", {"prompt_cache_key": "k"}, Turn("h")),
        (None, {"prompt_cache_key": "k"}, Turn("k")),
        (None, {"vllm_xargs": {"session_id": "x"}}, Turn("x")),
        (None, {"vllm_xargs": {"session_id": "x", "last_turn": 1}}, Turn("x", last=True)),
        ("h", {"vllm_xargs": {"last_turn": 1}}, Turn("h", last=True)),
        (None, {"session_id": 7}, Turn(None)),
        ("h", ["session_id", "prompt_cache_key"], Turn("h")),
    ],
)
def test_a_program_has_the_name_that_its_engine_will_know_it_by(header: str | None, body: object, turn: Turn) -> None:
    assert read_turn("POST", CHAT, header, json.dumps(body).encode()) == turn


def test_what_is_no_json_is_left_to_the_server() -> None:
    assert read_turn("POST", CHAT, "h", b'{"session_id"') == Turn("h")


def test_a_release_goes_to_the_programs_replica() -> None:
    assert read_turn("POST", "/v1/programs/a%2Fb%20c/release", None, b"") == Turn("a/b c", last=True)
    assert read_turn("GET", "/v1/programs/a/release", None, b"") == Turn(None)


@pytest.mark.parametrize(
    "path", ["/sleep", "/reset_prefix_cache", "/update_weights", "/v1/load_lora_adapter", "/pause"]
)
def test_what_changes_one_server_is_known(path: str) -> None:
    assert ONE_SERVERS_STATE.fullmatch(path)


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/completions", "/tokenize", "/v1/programs/sleep/release"])
def test_what_any_server_can_answer_is_not_among_it(path: str) -> None:
    assert not ONE_SERVERS_STATE.fullmatch(path)


def test_metrics_of_all_replicas_stand_on_one_page() -> None:
    page = '# HELP turns_total Turns.\n# TYPE turns_total counter\nturns_total{{engine="0"}} {}\n'
    watched = [SimpleNamespace(up=up, restarts=n) for up, n in ((True, 0), (True, 2), (False, 1))]
    text = merged([page.format(3), page.format(4), ""], watched).decode()
    assert text.count("# TYPE turns_total counter") == 1
    samples = {
        (sample.name, sample.labels["replica"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert [samples["turns_total", replica] for replica in "01"] == [3, 4]
    assert [samples["turnstile_replica_up", replica] for replica in "012"] == [1, 1, 0]
    assert [samples["turnstile_replica_restarts_total", replica] for replica in "012"] == [0, 2, 1]
    assert ("turns_total", "2") not in samples
