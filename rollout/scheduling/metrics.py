"""The way of the scheduler's numbers out of the engine-core process.

The scheduler runs in vLLM's engine core, a spawned process, and vLLM's ``SchedulerStats`` are typed on the wire: our
numbers cannot travel with them. Three routes lead out; all show the last published snapshot:

- ``metrics_path``: a JSON file, replaced whole, and beside it one line a finished job (``PATH.programs.jsonl``).
- ``metrics_port``: a Prometheus end point of the engine core itself, on all interfaces. Counts only, no program ids.
- ``expose(path)`` in the front end: vLLM's own ``/metrics`` shows what lies in that file. It does **not** with several
  API servers (the default under ``--data-parallel-size`` > 1) or ``PROMETHEUS_MULTIPROC_DIR``: vLLM then serves a
  registry that knows memory-mapped values only. Nor with the Rust front end, nor with an engine core elsewhere. Use the
  port there. Offline, ``LLM.get_metrics`` passes over names that are not vLLM's: read the file.

A scheduler is called only while there is work, so a snapshot is as old as the last step: an idle engine's is hours old
and right. Its age is exposed too. Under data parallelism every engine has a file and a port of its own (see
``engine_path``), and the ``engine`` label that vLLM's metrics have. Counters begin at 0 with every engine core.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.errors import UserError
from rollout.scheduling.counters import GAUGES, Counters, JobRecord

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger(__name__)

RECORD_BYTES = 16 * 2**20  # beyond this the records' file becomes PATH.programs.jsonl.1, and what had that name is lost
COUNTED = tuple(f.name for f in fields(Counters) if f.name != "drops")
AGE = "turnstile_snapshot_age_seconds"
AGE_HELP = "Seconds since these numbers were published. Large on an idle engine is normal; large under load: it hangs."


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All numbers at one moment: ``written`` is unix time, ``parent`` tells engines of one server from leftovers."""

    written: float
    engine: int
    parent: int
    counters: dict[str, float]
    drops: dict[str, int]
    gauges: dict[str, float | None]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self.counters, self.drops, self.gauges


def take(counters: Counters, gauges: Mapping[str, float | None], engine: int = 0) -> Snapshot:
    """The numbers now. A gauge that is None or missing is not known yet; an unknown name is a ValueError."""
    if unknown := set(gauges) - set(GAUGES):
        raise ValueError(f"gauges {sorted(unknown)} have no help text: add them to rollout.scheduling.counters.GAUGES")
    counts = {name: getattr(counters, name) for name in COUNTED}
    return Snapshot(time.time(), engine, os.getppid(), counts, dict(counters.drops), dict(gauges))


def engine_path(path: Path, engine: int) -> Path:
    """``stats.json`` → ``stats.json`` for engine 0, ``stats.1.json`` for engine 1, and so on."""
    return path.with_name(f"{path.stem}.{engine}{path.suffix}") if engine else path


def read_snapshot(path: Path) -> Snapshot | None:
    """What a ``Publisher`` left, or None if there is no file. Raises UserError if it is something else."""
    try:
        snapshot = Snapshot(**json.loads(path.read_text()))
        if set(snapshot.counters) != set(COUNTED):
            raise ValueError("another version counts other things")
        return snapshot
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); let the server's user read it") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path} is no snapshot of this version's scheduler; give another metrics_path") from None


def families(snapshots: Iterable[Snapshot], now: float) -> list[Metric]:
    """The snapshots as Prometheus metrics with the label ``engine``. ``now`` is unix time."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    snapshots = list(snapshots)
    found: list[Metric] = []
    for counter in fields(Counters):
        labels = ["engine", "cause"] if counter.name == "drops" else ["engine"]
        family = CounterMetricFamily(f"turnstile_{counter.name}", counter.metadata["help"], labels=labels)
        for snapshot in snapshots:
            engine = str(snapshot.engine)
            if counter.name == "drops":
                for cause, count in snapshot.drops.items():
                    family.add_metric([engine, cause], count)
            else:
                family.add_metric([engine], snapshot.counters[counter.name])
        found.append(family)
    for name, text in GAUGES.items():
        gauge = GaugeMetricFamily(f"turnstile_{name}", text, labels=["engine"])
        for snapshot in snapshots:
            value = snapshot.gauges.get(name)
            if value is not None:
                gauge.add_metric([str(snapshot.engine)], value)
        found.append(gauge)
    age = GaugeMetricFamily(AGE, AGE_HELP, labels=["engine"])
    for snapshot in snapshots:
        age.add_metric([str(snapshot.engine)], max(0.0, now - snapshot.written))
    return [*found, age]


class Publisher:
    """Publishes from the scheduler's loop: no thread reads the scheduler's state. Also a Prometheus collector.

    Publishes once when made (so ``gauges`` must work by then), then by ``tick``. Raises UserError if a route is closed
    from the start; a file that cannot be written later costs one warning, never the engine. With neither path nor port
    ticks do nothing. ``every``: seconds at least between two snapshots. ``engine``: its data-parallel index, which is
    added to the port.
    """

    def __init__(
        self,
        counters: Counters,
        gauges: Callable[[], Mapping[str, float | None]],
        *,
        path: str | Path | None = None,
        port: int | None = None,
        every: float = 1.0,
        engine: int = 0,
    ) -> None:
        if not every > 0:
            raise ValueError(f"every={every} is no number of seconds above 0")
        self._counters, self._gauges, self._every, self._engine = counters, gauges, every, engine
        self._path = None if path is None else engine_path(Path(path).absolute(), engine)
        if self._path is not None and self._path.is_dir():
            raise UserError(f"metrics_path: {path} is a folder; give a file in it")
        self._routed = path is not None or port is not None
        self._due = -math.inf if self._routed else math.inf
        self._records: list[str] = []
        self._failing = False
        self.snapshot = take(counters, gauges(), engine)
        try:
            self._write()
        except OSError as error:
            raise UserError(f"metrics_path: {path} cannot be written ({error.strerror}); give another file") from None
        self._server = None if port is None else _serve(self, port + engine if port else 0)

    @property
    def port(self) -> int | None:
        """The port that is listened on (for port 0: the one that was free)."""
        return None if self._server is None else int(self._server[0].server_port)

    def tick(self, now: float, *, idle: bool = False) -> None:
        """Call once a step. ``now``: the scheduler's clock, which never steps back. ``idle``: nothing is left to do.

        The engine sleeps after an idle step, so what has changed by then is published at once, due or not.
        """
        if now < self._due and not (idle and self._routed):
            return
        snapshot = take(self._counters, self._gauges(), self._engine)
        if now < self._due and snapshot.numbers == self.snapshot.numbers and not self._records:
            return
        self._due = now + self._every
        self.snapshot = snapshot
        self._store()

    def record(self, job: JobRecord, now: float) -> None:
        """Keep the record of a job that ended, to be written with the next snapshot; its times become unix time."""
        if self._path is not None:
            zero = time.time() - now
            times = {"arrived": round(job.arrived + zero, 3), "finished": round(job.finished + zero, 3)}
            self._records.append(json.dumps(asdict(job) | times))

    def close(self) -> None:
        """Publish the last numbers and stop listening. A second call does nothing new."""
        self.snapshot = take(self._counters, self._gauges(), self._engine)
        self._store()
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def collect(self) -> list[Metric]:
        return families([self.snapshot], time.time())

    def _store(self) -> None:
        try:
            self._write()
        except OSError as error:  # a full disk must not stop the engine
            if not self._failing:
                log.warning("metrics_path: %s cannot be written (%s); it is stale until it can", self._path, error)
            self._failing = True
        else:
            self._failing = False
        self._records.clear()

    def _write(self) -> None:
        if self._path is None:
            return
        whole = self._path.with_name(f"{self._path.name}.tmp")
        whole.write_text(json.dumps(asdict(self.snapshot)))
        whole.replace(self._path)
        if self._records:
            records = self._path.with_name(f"{self._path.name}.programs.jsonl")
            with records.open("a") as stream:
                stream.writelines(f"{line}\n" for line in self._records)
                size = stream.tell()
            if size > RECORD_BYTES:
                records.replace(records.with_name(f"{records.name}.1"))


def _serve(publisher: Publisher, port: int) -> Any:
    """A thread that answers Prometheus: (server, thread)."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(publisher)
    try:
        return start_http_server(port, registry=registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"metrics_port: {port} cannot be used ({reason}); give another metrics_port, or none") from None


class SnapshotCollector:
    """A Prometheus collector over a ``Publisher``'s file and those of its sister engines. No file: no samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failing = False

    def describe(self) -> list[Metric]:
        return families([], 0.0)

    def collect(self) -> list[Metric]:
        return families(self._read(), time.time())

    def _read(self) -> list[Snapshot]:
        found: list[Snapshot] = []
        try:
            while (snapshot := read_snapshot(engine_path(self.path, len(found)))) is not None:
                if found and snapshot.parent != found[0].parent:
                    break  # left by an earlier server with more engines
                found.append(snapshot)
        except UserError as error:  # vLLM's own metrics stand on the same page
            if not self._failing:
                log.warning("/metrics lacks the scheduler's numbers: %s", error)
            self._failing = True
        else:
            self._failing = False
        return found


def expose(path: str | Path) -> SnapshotCollector | None:
    """Let this process's default Prometheus registry, hence vLLM's ``/metrics``, show the snapshot at ``path``.

    A second call with the same path does nothing new; another path is a ValueError. None, with a warning, where vLLM
    serves another registry (see above).
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        log.warning("/metrics cannot show the scheduler's numbers with several API servers: use metrics_port")
        return None
    return _registered(Path(path).absolute())


@functools.cache
def _registered(path: Path) -> SnapshotCollector:
    from prometheus_client import REGISTRY

    collector = SnapshotCollector(path)
    REGISTRY.register(collector)
    return collector
