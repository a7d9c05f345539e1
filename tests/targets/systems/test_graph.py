"""The bottleneck of an exchange on random link graphs equals trying every path; a mesh, a switch and two nodes by hand."""

import random
from itertools import pairwise, permutations

import networkx as nx
import pytest
from moec.compiler.errors import MoecError
from moec.targets.systems.graph import MESSAGE, all_to_all, find_bottleneck, link_graph
from moec.targets.systems.read import find_system


def brute_force(graph, volumes):
    """Return (seconds, link) of the busiest link, with every path from device to device tried."""
    loads = dict.fromkeys(graph.edges, 0.0)
    for (a, b), volume in volumes.items():
        others = [n for n in graph if n not in (a, b)]
        paths = [(a, *middle, b) for size in range(len(others) + 1) for middle in permutations(others, size)]
        paths = [list(pairwise(path)) for path in paths]
        possible = [path for path in paths if all(graph.has_edge(*link) for link in path)]
        times = [
            sum(graph.edges[link]["latency"] + MESSAGE / graph.edges[link]["bandwidth"] for link in path)
            for path in possible
        ]
        for link in possible[times.index(min(times))]:
            loads[link] += volume
    return max((load / graph.edges[link]["bandwidth"], link) for link, load in loads.items())


@pytest.mark.parametrize("seed", range(40))
def test_bottleneck_is_that_of_brute_force(seed):
    rng = random.Random(seed)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(6))
    for a, b in permutations(range(6), 2):
        if rng.random() < 0.45:
            graph.add_edge(a, b, bandwidth=rng.uniform(1e9, 1e11), latency=rng.uniform(1e-6, 1e-5))
    volumes = {(a, b): rng.uniform(1e6, 1e9) for a, b in permutations(range(6), 2) if nx.has_path(graph, a, b)}
    found = find_bottleneck(graph, volumes)
    seconds, link = brute_force(graph, volumes)
    assert found.link == link
    assert found.seconds == pytest.approx(seconds)


def test_a_device_that_no_link_reaches_is_refused():
    graph = nx.DiGraph()
    graph.add_edge(0, 1, bandwidth=1e9, latency=1e-6)
    with pytest.raises(MoecError, match="no link leads from device 1 to device 0"):
        find_bottleneck(graph, {(1, 0): 1.0})


def test_exchanges_by_hand():
    # a switch: what a device sends leaves by its own port
    assert all_to_all(find_system("hgx-h200"), 8).seconds == pytest.approx(1 / 450e9)
    # a mesh: a seventh of it over each of seven links
    assert all_to_all(find_system("mi300x-x8"), 8).seconds == pytest.approx(1 / 7 / 64e9)
    # two nodes: eight of fifteen parts leave the node by the device's RDMA port
    assert all_to_all(find_system("hgx-h200-x4"), 16).seconds == pytest.approx(8 / 15 / 50e9)


def test_graph_has_each_device_and_switch():
    graph = link_graph(find_system("hgx-h200-x4"))
    assert len(graph) == 32 + 4 + 1
    assert all(graph.has_edge(b, a) for a, b in graph.edges)
