"""The warning about processors of several NUMA nodes."""

import os
import sys
from pathlib import Path

import pytest

from nanovllm.cli.numa import numa_nodes, numa_warning


def make_nodes(folder: Path, **lists: str) -> Path:
    for name, text in lists.items():
        (folder / name).mkdir()
        (folder / name / "cpulist").write_text(text, encoding="ascii")
    return folder


def test_the_nodes_are_those_with_a_processor_of_the_process(tmp_path: Path) -> None:
    nodes = make_nodes(tmp_path, node0="0-3,8-11\n", node1="4-7,12\n", node10="\n")
    (tmp_path / "node2").mkdir()  # a node without a readable list
    assert numa_nodes({0, 9}, nodes) == [0]
    assert numa_nodes({12}, nodes) == [1]
    assert numa_nodes({3, 4}, nodes) == [0, 1]
    assert numa_nodes({99}, nodes) == []
    assert numa_nodes({0}, tmp_path / "nothing") == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs the list of processors of Linux")
def test_a_warning_names_the_nodes_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = make_nodes(tmp_path, node0="0-1\n", node1="2-3\n", node2="4\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert numa_warning(nodes) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 4})
    warning = numa_warning(nodes) or ""
    assert "NUMA nodes 0, 1 and 2" in warning
    assert "numactl -N 0 -m 0 nanovllm serve" in warning
