"""Numbers arrive outside the engine core as they were inside: in the file, at the port, on vLLM's own page."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rollout.errors import UserError
from rollout.scheduling import metrics
from rollout.scheduling.counters import DROP_CAUSES, GAUGES, Counters, JobRecord
from rollout.scheduling.metrics import Publisher, SnapshotCollector, expose, read_snapshot, take

DASHBOARD = Path(__file__).parents[3] / "serving" / "grafana" / "turnstile.json"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Scheduler:
    """What a Publisher sees of one."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.values: dict[str, float | None] = dict.fromkeys(GAUGES, 0)
        self.asked = 0

    def gauges(self) -> dict[str, float | None]:
        self.asked += 1
        return dict(self.values)

    def publisher(self, **options: Any) -> Publisher:
        return Publisher(self.counters, self.gauges, **options)


def job(**changes: Any) -> JobRecord:
    some = {"program": "s", "job": 1, "turns": 6, "arrived": 10.0, "finished": 30.0, "gaps": 12.0, "waited": 3.0}
    return JobRecord(**(some | {"tokens": 900, "reused": 700, "recomputed": 20, "preempted": 0} | changes))


def samples(text: str) -> Samples:
    """Prometheus' own parser as the judge of what we expose."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in found}


def page(collector: Any) -> Samples:
    registry = CollectorRegistry()
    registry.register(collector)
    return samples(generate_latest(registry).decode())


def fetch(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


ENGINE_0 = (("engine", "0"),)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 2**53), min_size=len(fields(Counters)) - 1, max_size=len(fields(Counters)) - 1),
    st.dictionaries(st.sampled_from(DROP_CAUSES), st.integers(1, 2**53)),
    st.dictionaries(st.sampled_from(sorted(GAUGES)), st.none() | st.floats(0, 1e12)),
)
def test_what_is_counted_is_what_is_exposed(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], drops: dict[str, int], gauges: dict[str, float | None]
) -> None:
    names = [f.name for f in fields(Counters) if f.name != "drops"]
    counters = Counters(**dict(zip(names, counts, strict=True)))
    counters.drops.update(drops)
    path = tmp_path_factory.mktemp("m") / "stats.json"
    publisher = Publisher(counters, lambda: gauges, path=path)
    for shown in (page(publisher), page(SnapshotCollector(path))):
        age = shown.pop(("turnstile_snapshot_age_seconds", ENGINE_0))
        assert 0 <= age < 60
        expected: Samples = {(f"turnstile_{n}_total", ENGINE_0): c for n, c in zip(names, counts, strict=True)}
        expected |= {
            ("turnstile_drops_total", (("cause", cause), *ENGINE_0)): drops.get(cause, 0) for cause in DROP_CAUSES
        }
        expected |= {(f"turnstile_{n}", ENGINE_0): v for n, v in gauges.items() if v is not None}
        assert shown == expected


def test_every_number_says_what_it_means() -> None:
    texts = [f.metadata["help"] for f in fields(Counters)] + list(GAUGES.values())
    assert all(text.endswith(".") and len(text) > 15 for text in texts)


def test_a_gauge_without_a_help_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['pined_blocks'\]"):
        take(Counters(), {"pined_blocks": 1})


def test_nothing_is_read_or_written_before_it_is_due(tmp_path: Path) -> None:
    scheduler = Scheduler()
    publisher = scheduler.publisher(path=tmp_path / "s.json", every=1.0)
    scheduler.asked = 0
    published = 0
    for step in range(1000):  # 10 s, in steps of 10 ms
        scheduler.counters.turns += 1
        publisher.tick(100.0 + step / 100)
        if scheduler.asked > published:
            published = scheduler.asked
            on_disk = read_snapshot(tmp_path / "s.json")
            assert on_disk is not None and on_disk.counters["turns"] == step + 1
    assert published == 10


def test_the_last_numbers_before_the_engine_sleeps_are_published_at_once(tmp_path: Path) -> None:
    scheduler = Scheduler()
    publisher = scheduler.publisher(path=tmp_path / "s.json", every=1.0)
    publisher.tick(5.0)
    scheduler.counters.jobs += 1
    publisher.tick(5.1)
    assert publisher.snapshot.counters["jobs"] == 0
    publisher.tick(5.2, idle=True)
    on_disk = read_snapshot(tmp_path / "s.json")
    assert on_disk is not None and on_disk.counters["jobs"] == 1
    publisher.tick(5.3, idle=True)  # nothing new: an idle loop writes nothing
    assert read_snapshot(tmp_path / "s.json") == on_disk


def test_without_a_route_nothing_is_read() -> None:
    scheduler = Scheduler()
    publisher = scheduler.publisher()
    scheduler.asked = 0
    for now in (1.0, 1e6):
        publisher.tick(now)
        publisher.tick(now, idle=True)
    assert scheduler.asked == 0


def test_a_reader_never_sees_half_a_snapshot(tmp_path: Path) -> None:
    scheduler = Scheduler()
    path = tmp_path / "s.json"
    publisher = scheduler.publisher(path=path, every=1e-9)
    seen: list[float] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            snapshot = read_snapshot(path)  # raises on half a file
            assert snapshot is not None and snapshot.counters["pins"] == snapshot.gauges["pins_now"]
            seen.append(snapshot.counters["pins"])

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        scheduler.counters.pins = step
        scheduler.values["pins_now"] = step
        publisher.tick(float(step))
    done.set()
    reader.join()
    assert seen and seen == sorted(seen)


def test_records_of_jobs_are_appended_with_unix_times(tmp_path: Path) -> None:
    publisher = Scheduler().publisher(path=tmp_path / "s.json")
    publisher.record(job(program="täsk \ud800\n"), now=30.0)  # no name can break a line or the file
    publisher.record(job(job=2), now=31.0)
    publisher.tick(31.0)
    lines = (tmp_path / "s.json.programs.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["program"] == "täsk \ud800\n" and second["job"] == 2
    assert set(first) == {f.name for f in fields(JobRecord)}
    assert first["finished"] - first["arrived"] == pytest.approx(20.0, abs=0.01)
    assert first["finished"] == pytest.approx(time.time(), abs=10)
    assert job().delay == 8.0


def test_records_take_bounded_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RECORD_BYTES", 2000)
    publisher = Scheduler().publisher(path=tmp_path / "s.json")
    for number in range(100):
        publisher.record(job(job=number), now=0.0)
        publisher.tick(2.0 * number)
    now, before = tmp_path / "s.json.programs.jsonl", tmp_path / "s.json.programs.jsonl.1"
    kept = [
        json.loads(line)["job"] for file in (before, now) if file.exists() for line in file.read_text().splitlines()
    ]
    assert kept == list(range(100 - len(kept), 100)) and 5 < len(kept) < 30  # the newest, without a hole
    assert before.stat().st_size < 3000


def test_the_port_answers_prometheus_and_is_free_after_close() -> None:
    scheduler = Scheduler()
    publisher = scheduler.publisher(port=0)
    port = publisher.port
    scheduler.counters.claims = 3
    publisher.tick(0.0)
    text = fetch(port)
    assert samples(text)["turnstile_claims_total", ENGINE_0] == 3
    assert "# HELP turnstile_claims_total Pins that the next turn came back to." in text
    assert not any(name.startswith(("python_", "process_")) for name, _ in samples(text))  # a registry of its own
    publisher.close()
    publisher.close()
    second = scheduler.publisher(port=port)
    assert samples(fetch(port))["turnstile_claims_total", ENGINE_0] == 3
    second.close()


def test_a_taken_port_is_one_line_that_names_the_option() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^metrics_port: {port} cannot be used \(Address already in use\); give ano"
        ):
            Scheduler().publisher(port=port)
    with pytest.raises(UserError, match=r"^metrics_port: 70000 cannot be used"):
        Scheduler().publisher(port=70000)


def test_a_path_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^metrics_path: .*/none/s.json cannot be written \(No such file"):
        Scheduler().publisher(path=tmp_path / "none" / "s.json")
    with pytest.raises(UserError, match="is a folder"):
        Scheduler().publisher(path=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="every=0 is no number"):
        Scheduler().publisher(every=0)


def test_a_disk_that_fails_later_costs_one_warning_and_not_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler()
    folder = tmp_path / "runs"
    folder.mkdir()
    publisher = scheduler.publisher(path=folder / "s.json")
    (folder / "s.json").unlink()
    folder.rmdir()
    for now in (2.0, 4.0, 6.0):
        publisher.tick(now)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    folder.mkdir()
    scheduler.counters.pins = 7
    publisher.tick(8.0)
    on_disk = read_snapshot(folder / "s.json")
    assert on_disk is not None and on_disk.counters["pins"] == 7


def test_close_leaves_the_last_numbers(tmp_path: Path) -> None:
    scheduler = Scheduler()
    publisher = scheduler.publisher(path=tmp_path / "s.json")
    scheduler.counters.drops["shutdown"] += 2
    publisher.record(job(), now=1.0)
    publisher.close()
    on_disk = read_snapshot(tmp_path / "s.json")
    assert on_disk is not None and on_disk.drops["shutdown"] == 2
    assert len((tmp_path / "s.json.programs.jsonl").read_text().splitlines()) == 1


def test_an_idle_engines_age_is_told(tmp_path: Path) -> None:
    Scheduler().publisher(path=tmp_path / "s.json")
    record = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps(record | {"written": time.time() - 600}))
    assert page(SnapshotCollector(tmp_path / "s.json"))["turnstile_snapshot_age_seconds", ENGINE_0] == pytest.approx(
        600, abs=10
    )


def test_without_a_file_there_is_no_sample_and_a_strange_file_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collector = SnapshotCollector(tmp_path / "s.json")
    assert page(collector) == {} and not caplog.records
    good = Scheduler().publisher(path=tmp_path / "s.json").snapshot
    for text in ("", "[]", "{", '{"a": 1}', json.dumps({f.name: {} for f in fields(good)})):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(UserError, match="is no snapshot"):
            read_snapshot(tmp_path / "s.json")
        assert page(collector) == {}
    assert len(caplog.records) == 1


def test_engines_of_one_server_have_files_and_labels_of_their_own(tmp_path: Path) -> None:
    schedulers = [Scheduler() for _ in range(3)]
    for engine, scheduler in enumerate(schedulers):
        scheduler.counters.pins = 10 + engine
        scheduler.publisher(path=tmp_path / "s.json", engine=engine)
    assert {file.name for file in tmp_path.iterdir()} == {"s.json", "s.1.json", "s.2.json"}
    leftover = json.loads((tmp_path / "s.2.json").read_text())
    (tmp_path / "s.2.json").write_text(json.dumps(leftover | {"parent": -1}))  # of a server that had three
    shown = page(SnapshotCollector(tmp_path / "s.json"))
    pins = {labels: value for (name, labels), value in shown.items() if name == "turnstile_pins_total"}
    assert pins == {(("engine", "0"),): 10, (("engine", "1"),): 11}


def vllm_page() -> str:
    """What the OpenAI server of vLLM answers on /metrics."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    attach_router(app)
    return TestClient(app).get("/metrics").text


@pytest.fixture
def unexposed() -> Iterator[None]:
    yield
    for collector in [c for c in REGISTRY._collector_to_names if isinstance(c, SnapshotCollector)]:
        REGISTRY.unregister(collector)
    metrics._registered.cache_clear()


@pytest.mark.usefixtures("unexposed")
def test_the_page_of_vllms_own_server_shows_the_numbers(tmp_path: Path) -> None:
    scheduler = Scheduler()
    scheduler.counters.claims = 41
    scheduler.publisher(path=tmp_path / "s.json")
    assert expose(tmp_path / "s.json") is expose(str(tmp_path / "s.json"))
    assert samples(vllm_page())["turnstile_claims_total", ENGINE_0] == 41
    with pytest.raises(ValueError, match="Duplicated"):
        expose(tmp_path / "other.json")


@pytest.mark.usefixtures("unexposed")
def test_with_several_api_servers_the_page_cannot_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Scheduler().publisher(path=tmp_path / "s.json")
    expose(tmp_path / "s.json")  # even where it is registered, vLLM serves another registry:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert "turnstile_" not in vllm_page()
    assert expose(tmp_path / "s.json") is None
    assert "use metrics_port" in caplog.text


def test_the_dashboard_asks_for_numbers_that_exist() -> None:
    board = json.loads(DASHBOARD.read_text())
    variables = [variable["name"] for variable in board["templating"]["list"]]
    assert variables == ["DS_PROMETHEUS"] and 6 <= len(board["panels"]) <= 8
    exposed = {name for name, _ in page(Scheduler().publisher())}
    package = find_spec("vllm")
    assert package is not None and package.submodule_search_locations is not None
    stock = (Path(package.submodule_search_locations[0]) / "v1" / "metrics" / "loggers.py").read_text()
    asked: set[str] = set()
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == "${DS_PROMETHEUS}" and panel["description"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${DS_PROMETHEUS}"
            names = re.findall(r"(?:turnstile_|vllm:)\w+", target["expr"])
            assert names, target["expr"]
            asked.update(names)
    assert {name for name in asked if name.startswith("turnstile_")} <= exposed
    for name in asked - exposed:
        assert f'name="{re.sub("_(total|bucket)$", "", name)}"' in stock
    assert {"turnstile_claims_total", "turnstile_pinned_blocks", "vllm:request_queue_time_seconds_bucket"} <= asked


def test_the_arithmetic_imports_neither_vllm_nor_prometheus() -> None:
    heavy = "{'vllm', 'torch', 'hydra', 'prometheus_client', 'matplotlib'}"
    code = f"import sys, rollout.scheduling.metrics; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
