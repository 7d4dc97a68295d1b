"""What is said about NUMA nodes, on machines simulated by files."""

import os
import sys
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm.cli.numa import describe_nodes, numa_warning
from nanovllm.model.machine import numa_nodes, read_ranges, usable_nodes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the nodes")

ONE = {"node0": "0-3\n"}
TWO = {"node0": "0-3,8-11\n", "node1": "4-7,12-15\n"}
HOLES = {"node0": "0-1\n", "node2": "4,6\n", "node5": "8-9\n", "node11": "10-11,13\n"}
MEMORY_ONLY = {"node0": "0-3\n", "node1": "\n"}


def machine(root: Path, nodes: dict[str, str]) -> Path:
    for name, text in nodes.items():
        folder = root / "sys/devices/system/node" / name
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text, encoding="ascii")
    return root


@pytest.mark.parametrize(
    ("nodes", "mask", "warned", "described"),
    [
        ({}, {0, 1}, None, ""),
        (ONE, {0, 1, 2, 3}, None, "0: 0-3"),
        (ONE, {1}, None, "0: 0-3 (1 usable)"),
        (ONE, {64}, None, "0: 0-3 (none usable)"),
        (TWO, set(range(16)), "0 and 1", "0: 0-3,8-11; 1: 4-7,12-15"),
        (TWO, {3, 4}, "0 and 1", "0: 0-3,8-11 (3 usable); 1: 4-7,12-15 (4 usable)"),
        # A control group's mask within one node.
        (TWO, {4, 5, 6, 12}, None, "0: 0-3,8-11 (none usable); 1: 4-7,12-15 (4-6,12 usable)"),
        (HOLES, {0, 1, 4, 6, 8, 9, 10, 11, 13}, "0, 2, 5 and 11",
         "0: 0-1; 2: 4,6; 5: 8-9; 11: 10-11,13"),
        (HOLES, {6, 13}, "2 and 11",
         "0: 0-1 (none usable); 2: 4,6 (6 usable); 5: 8-9 (none usable); 11: 10-11,13 (13 usable)"),
        (MEMORY_ONLY, {0, 1, 2, 3}, None, "0: 0-3; 1: memory only"),
        # Files that are no lists are left out.
        ({"node0": "0-1\n", "node1": "2-x\n"}, {0, 1, 2}, None, "0: 0-1"),
    ],
)  # fmt: skip
def test_a_mask_of_several_nodes_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: dict[str, str],
    mask: set[int],
    warned: str | None,
    described: str,
) -> None:
    root = machine(tmp_path, nodes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mask)
    assert describe_nodes(root) == described
    warning = numa_warning("nanovllm serve", root)
    if warned is None:
        assert warning is None
        return
    assert warning is not None
    first = warned.partition(" ")[0].rstrip(",")
    assert f"the NUMA nodes {warned}," in warning
    assert f"numactl --cpunodebind={first} --membind={first} nanovllm serve" in warning


def test_a_node_without_a_list_is_left_out(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO)
    (root / "sys/devices/system/node/node1/cpulist").unlink()
    assert numa_nodes(root) == {0: read_ranges("0-3,8-11")}


def test_this_machine_has_all_usable_processors_on_its_nodes() -> None:
    nodes = usable_nodes()
    if not nodes:
        pytest.skip("this kernel lists no nodes")
    assert set().union(*nodes.values()) == os.sched_getaffinity(0)


def test_bench_warns_once_before_it_measures(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nodes = {0: {0}, 1: {1}}
    monkeypatch.setattr("nanovllm.cli.numa.usable_nodes", lambda root: nodes)
    work = "--backend numpy --batch-size 1 --input-len 2 --output-len 1 --num-iters 1 --no-limits"
    assert main(["bench", "latency", str(tiny_model), *work.split()]) == 0
    warning = numa_warning("nanovllm bench")
    assert warning is not None
    assert capsys.readouterr().err.count(warning) == 1


def test_env_shows_the_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanovllm.cli.numa.numa_nodes", lambda root: {0: {0, 1, 2}, 3: set()})
    monkeypatch.setattr("nanovllm.cli.numa.usable_nodes", lambda root: {0: {0, 2}})
    assert main(["env"]) == 0
    assert "NUMA nodes       0: 0-2 (0,2 usable); 3: memory only\n" in capsys.readouterr().out
