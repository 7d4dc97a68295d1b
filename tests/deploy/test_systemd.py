"""The unit of systemd: valid, its options exist, and its times fit together."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nanovllm.cli.main import build_parser

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "nanovllm.service"


def service() -> dict[str, list[str]]:
    """Return the settings of the service, a list of values each."""
    text = UNIT.read_text(encoding="utf-8").replace("\\\n", " ")
    settings: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text.partition("[Service]\n")[2], re.MULTILINE):
        settings.setdefault(name, []).append(value)
    return settings


def test_the_server_parses_its_arguments_and_has_time_to_stop() -> None:
    settings = service()
    program, *arguments = shlex.split(settings["ExecStart"][0])
    assert program.endswith("/nanovllm")
    arguments.remove("$OPTIONS")
    parsed = build_parser().parse_args([part.replace("${MODEL}", "gpt2") for part in arguments])
    assert parsed.model == "gpt2"
    stop_s = int(settings["TimeoutStopSec"][0].removesuffix("s"))
    assert parsed.drain_delay_s > 0
    assert stop_s > parsed.drain_delay_s + parsed.shutdown_timeout_s


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit_and_its_exposure_is_low(tmp_path: Path) -> None:
    program = tmp_path / "nanovllm"
    program.symlink_to(shutil.which("true") or "true")
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/nanovllm/bin/nanovllm", str(program)), encoding="utf-8")
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(
            ["systemd-analyze", *command, str(unit)],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert UNIT.name not in done.stderr, "a warning about the unit"
