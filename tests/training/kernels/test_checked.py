"""Operations under NANOVLLM_CHECK=1: no kernel touches memory outside its arrays."""

from pathlib import Path

import pytest

from tests.support.checked import run_checked

CASES = "tests/training/kernels/test_operations.py"


@pytest.mark.slow(24)
def test_operations_under_the_check(tmp_path: Path) -> None:
    """The checked library is compiled in another process, which saves no code."""
    run_checked("-m", "pytest", "-q", "-x", CASES, folder=tmp_path / "cache")
    kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.kernels")]
    assert all(size < 1000 for size in kept), "no code, at most the measured speeds (peak.py)"
