"""Every graph of graphs.py on a running ComfyUI: picture, picture without Apply, and receipt agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.hub_server import FakeHub
from tests.nodes.graph_check import Graph, Runner, faults, write_files
from tests.nodes.graphs import GRAPHS, KEEPING
from tests.nodes.server import Server


@pytest.fixture(scope="module")
def runner(comfyui: Path, fake_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    server = Server(comfyui, tmp_path_factory.mktemp("graphs"), fake_hub.environment(), KEEPING)
    write_files(server.base)
    try:
        server.wait()
        yield Runner(server)
    finally:
        server.stop()


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_picture_and_receipt_agree(runner: Runner, graph: Graph) -> None:
    if lacking := runner.lacks(graph):
        pytest.skip(f"this ComfyUI has no node {', '.join(lacking)}")
    found, happened = faults(graph, runner)
    assert not found, "\n".join([happened, *found])


def test_the_graphs_are_enough_and_named_once() -> None:
    names = [str(graph) for graph in GRAPHS]
    assert len(set(names)) == len(names) >= 40
