"""The metrics of several servers on one page, told apart by the label ``replica``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class Watched(Protocol):
    """What is told of a replica."""

    up: bool
    restarts: int


def merged(pages: Sequence[str], replicas: Sequence[Watched]) -> bytes:
    """Prometheus text of all ``pages``, one a replica, which may be empty, and whether each is up."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Pages(pages, replicas))
    return generate_latest(registry)


class _Pages(Collector):
    def __init__(self, pages: Sequence[str], replicas: Sequence[Watched]) -> None:
        self._pages = pages
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("turnstile_replica_up", "Whether requests go to the replica.", labels=["replica"])
        restarts = CounterMetricFamily(
            "turnstile_replica_restarts", "How often the replica's server was started anew.", labels=["replica"]
        )
        for index, replica in enumerate(self._replicas):
            up.add_metric([str(index)], float(replica.up))
            restarts.add_metric([str(index)], replica.restarts)
        yield from (up, restarts, *_labelled(self._pages))


def _labelled(pages: Sequence[str]) -> Iterable[Metric]:
    families: dict[str, Metric] = {}
    for index, page in enumerate(pages):
        for family in text_string_to_metric_families(page):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            kept.samples += [s._replace(labels={**s.labels, "replica": str(index)}) for s in family.samples]
    return families.values()
