"""The access log leaves out the files of the inspector and checks of the health."""

import logging

import pytest

from nanovllm.server.http.access_log import RoutineFilter, leave_out_routine_requests


def is_written(method: str, target: str, status: int) -> bool:
    record = logging.makeLogRecord({"args": ("127.0.0.1:1", method, target, "1.1", status)})
    return bool(RoutineFilter().filter(record))


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/inspector/0f3a/style.css", 200),
        ("GET", "/inspector/0f3a/style.css", 304),
        ("GET", "/health", 200),
        ("HEAD", "/health?probe=1", 200),
        ("GET", "/ping/", 200),
    ],
)
def test_routine_requests_are_left_out(method: str, target: str, status: int) -> None:
    assert not is_written(method, target, status)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/health", 503),
        ("GET", "/inspector/old/style.css", 404),
        ("POST", "/health", 405),
        ("POST", "/v1/completions", 200),
        ("GET", "/healthy", 200),
    ],
)
def test_other_requests_and_failures_are_written(method: str, target: str, status: int) -> None:
    assert is_written(method, target, status)


def test_the_filter_is_added_once() -> None:
    logger = logging.getLogger("uvicorn.access")
    before = list(logger.filters)
    try:
        leave_out_routine_requests()
        leave_out_routine_requests()
        assert sum(isinstance(each, RoutineFilter) for each in logger.filters) == 1
    finally:
        logger.filters = before
