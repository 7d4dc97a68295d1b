"""The worker process: its replies, its limits, and its end."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    RequestTimeoutError,
)
from nanovllm.inspection import responses, worker_process
from nanovllm.inspection.observe import InspectedModel
from nanovllm.inspection.worker_process import InspectionWorker
from tests.support.serving import wait_until

if sys.platform == "linux":
    import resource

PROMPT = {"prompt": "the cat"}


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> Iterator[InspectionWorker]:
    worker = InspectionWorker(tiny_model)
    yield worker
    worker.close()
    assert worker.pid is None


def test_a_response_is_that_of_the_function(
    worker: InspectionWorker, model: InspectedModel
) -> None:
    body = json.loads(worker.run("attention", {**PROMPT, "layer": 1}))
    assert body == responses.run(model, "attention", {"prompt": "the cat", "layer": 1})
    pid = worker.pid
    assert json.loads(worker.run("overview", PROMPT)) == responses.run(
        model, "overview", {"prompt": "the cat"}
    )
    assert worker.pid == pid


def test_an_invalid_request_keeps_the_process(worker: InspectionWorker) -> None:
    worker.run("overview", PROMPT)
    pid = worker.pid
    with pytest.raises(InvalidRequestError, match="layer is 7") as raised:
        worker.run("attention", {**PROMPT, "layer": 7})
    assert raised.value.param == "layer"
    assert worker.pid == pid


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no niceness")
def test_the_process_has_the_lowest_priority(worker: InspectionWorker) -> None:
    worker.run("overview", PROMPT)
    assert worker.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == 19


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills the largest process")
def test_the_process_is_killed_before_the_server_if_memory_runs_out(
    worker: InspectionWorker,
) -> None:
    worker.run("overview", PROMPT)
    assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text() == "1000\n"


def test_a_process_that_ended_while_idle_is_replaced(worker: InspectionWorker) -> None:
    worker.run("overview", PROMPT)
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    wait_until(lambda: worker.pid is None)
    assert json.loads(worker.run("overview", PROMPT))["heads"]
    assert worker.pid not in (None, pid)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no limit of processor time")
def test_a_call_that_takes_too_long_ends_the_process(tiny_model: Path) -> None:
    worker = InspectionWorker(tiny_model, max_cpu_s=0.01)
    with pytest.raises(RequestTimeoutError, match=r"longer than 0\.0[14] s, the limit; shorten"):
        worker.run("logit_lens", {"prompt": list(range(128))})
    assert worker.pid is None
    worker.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no limit of processor time")
def test_the_loss_without_each_part_has_a_longer_limit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = InspectionWorker(tiny_model, max_cpu_s=0.01)
    arguments = {"prompt": list(range(128))}
    assert len(json.loads(worker.run("ablation_map", arguments))["parts"]) == 14
    monkeypatch.setattr(worker_process, "MAX_LONG_CPU_S", 0.01)
    with pytest.raises(RequestTimeoutError):
        worker.run("ablation_map", arguments)
    worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is of Linux")
def test_a_process_without_memory_is_replaced(worker: InspectionWorker) -> None:
    worker.run("overview", PROMPT)
    pid = worker.pid
    assert pid is not None
    soft_limit, hard_limit = resource.prlimit(pid, resource.RLIMIT_AS)
    assert 1 << 30 < soft_limit < 1 << 33
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, hard_limit))
    # The process reports the fault if it can; one that cannot grow its stack is killed instead.
    with pytest.raises((InvalidRequestError, EngineFaultError), match=r"ran out of mem|unexpected"):
        worker.run("logit_lens", {"prompt": list(range(128)), "top": 20})
    assert worker.pid is None
    assert json.loads(worker.run("overview", PROMPT))["heads"]


def test_an_idle_process_ends(tiny_model: Path) -> None:
    worker = InspectionWorker(tiny_model, idle_timeout_s=0.01)
    assert json.loads(worker.run("neighbors", {"token": 3}))["token"]["id"] == 3
    wait_until(lambda: worker.pid is None)
    worker.close()


def test_closing_ends_the_process_and_later_calls(tiny_model: Path) -> None:
    worker = InspectionWorker(tiny_model)
    worker.run("overview", PROMPT)
    worker.close()
    worker.close()
    assert worker.pid is None
    with pytest.raises(EngineNotReadyError):
        worker.run("overview", PROMPT)


def test_closing_fails_a_call_that_runs(tiny_model: Path) -> None:
    worker = InspectionWorker(tiny_model)
    errors: list[Exception] = []

    def call() -> None:
        try:
            while True:
                worker.run("logit_lens", {"prompt": list(range(128))})
        except EngineNotReadyError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    wait_until(lambda: worker.pid is not None)
    worker.close()
    thread.join()
    assert len(errors) == 1


def test_a_folder_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineFaultError, match=r"config\.json"):
        InspectionWorker(tmp_path).run("overview", PROMPT)
