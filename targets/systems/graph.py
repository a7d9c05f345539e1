"""The link graph of a system, what an exchange puts on each link, and which link bounds it.

Nodes are devices (0, 1, ...) and switches; edges are one-way links with `bandwidth` and `latency`. A message takes the
path on which one of `MESSAGE` bytes arrives first, as a collective library does that knows the topology.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise

import networkx as nx

from ...compiler.errors import MoecError
from .system import Fabric, System

MESSAGE = 1e6
ALIKE = 64
Link = tuple[Hashable, Hashable]


@dataclass(frozen=True)
class Bottleneck:
    """The link that bounds an exchange, the bytes on it, and how long they take; `latency` is that of the longest path."""

    link: Link
    load: float
    seconds: float
    latency: float


def link_graph(system: System) -> nx.DiGraph:
    """Return the graph of a system's devices and switches."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(system.devices))
    for fabric in system.fabrics:
        for first in range(0, system.devices, fabric.span):
            _join_devices(graph, fabric, range(first, min(first + fabric.span, system.devices)))
    return graph


def _join_devices(graph: nx.DiGraph, fabric: Fabric, members: range) -> None:
    if len(members) < 2:
        return
    if fabric.shape == "switch":
        switch = f"{fabric.name}.{members.start // fabric.span}"
        pairs: Iterable[tuple[Hashable, Hashable]] = [(device, switch) for device in members]
        latency = fabric.latency.value / 2  # a path through the switch has two links
    else:
        pairs = combinations(members, 2) if fabric.shape == "mesh" else pairwise(members)
        latency = fabric.latency.value
    for a, b in pairs:
        for link in ((a, b), (b, a)):
            known = graph.get_edge_data(*link)
            if known is None or known["bandwidth"] < fabric.bandwidth.value:
                graph.add_edge(*link, bandwidth=fabric.bandwidth.value, latency=latency)


def _message_time(a: Hashable, b: Hashable, link: Mapping[str, float]) -> float:
    return link["latency"] + MESSAGE / link["bandwidth"]


def find_bottleneck(graph: nx.DiGraph, volumes: Mapping[Link, float]) -> Bottleneck:
    """Return the link that is busy longest where `volumes` has the bytes from device to device.

    Raises MoecError where a device cannot reach another one that it sends to, and for no volumes at all.
    """
    loads: dict[Link, float] = defaultdict(float)
    latency = 0.0
    for source in {a for (a, b), volume in volumes.items() if a != b and volume > 0}:
        paths = nx.single_source_dijkstra_path(graph, source, weight=_message_time)
        for (a, target), volume in volumes.items():
            if a != source or target == source or volume <= 0:
                continue
            if target not in paths:
                raise MoecError(f"no link leads from device {source} to device {target}", todo="join them by a fabric")
            path = list(pairwise(paths[target]))
            latency = max(latency, sum(graph.edges[link]["latency"] for link in path))
            for link in path:
                loads[link] += volume
    if not loads:
        raise MoecError("an exchange needs two devices that send something")
    link = max(loads, key=lambda each: loads[each] / graph.edges[each]["bandwidth"])
    return Bottleneck(link, loads[link], loads[link] / graph.edges[link]["bandwidth"], latency)


@lru_cache(maxsize=1024)
def pool_transfer(system: System, senders: int) -> Bottleneck:
    """Return the bottleneck where each of the first `senders` devices sends one byte to one of the others, these evenly used."""
    others = system.devices - senders
    looked_at = range(min(senders, ALIKE))
    return find_bottleneck(link_graph(system), {(i, senders + i * others // senders): 1.0 for i in looked_at})


@lru_cache(maxsize=4096)
def all_to_all(system: System, ranks: int, stride: int = 1) -> Bottleneck:
    """Return the bottleneck where each of `ranks` devices, `stride` apart, sends one byte in all, evenly to the others.

    Times of other volumes are in proportion. Of more than `ALIKE` devices, which no system of today joins but alike, the
    paths of the first are looked at for all. MoecError where the links do not join them.
    """
    devices = range(0, ranks * stride, stride)
    senders = devices if ranks <= ALIKE else devices[:1]
    graph = link_graph(system.of_devices(max(ranks * stride, 1)))
    each = 1.0 / (ranks - 1)
    return find_bottleneck(graph, {(a, b): each for a in senders for b in devices if a != b})
