"""Every graph of graphs.py on a running ComfyUI: picture, picture without Apply, and receipt agree."""

from __future__ import annotations

import pytest

from tests.nodes.graph_check import Graph, Runner, faults, write_files
from tests.nodes.graphs import GRAPHS
from tests.nodes.server import Server


@pytest.fixture(scope="module")
def runner(server: Server) -> Runner:
    write_files(server.base)
    return Runner(server)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_picture_and_receipt_agree(runner: Runner, graph: Graph) -> None:
    if lacking := runner.lacks(graph):
        pytest.skip(f"this ComfyUI has no node {', '.join(lacking)}")
    found, happened = faults(graph, runner)
    assert not found, "\n".join([happened, *found])


def test_the_graphs_are_enough_and_named_once() -> None:
    names = [str(graph) for graph in GRAPHS]
    assert len(set(names)) == len(names) >= 40
