"""The clock of a run stands still while the process is stopped."""

import signal
import sys

import pytest

from nanovllm.training.run.clock import RunClock


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGCONT")
def test_the_time_before_sigcont_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 100.0, 102.0])
    monkeypatch.setattr("nanovllm.training.run.clock.time.perf_counter", lambda: next(times))
    before = signal.getsignal(signal.SIGCONT)
    with RunClock() as clock:
        assert clock.read_s() == 1.0
        assert clock.read_s() == 3.0
        signal.raise_signal(signal.SIGCONT)
        assert clock.read_s() == 5.0
    assert signal.getsignal(signal.SIGCONT) is before
