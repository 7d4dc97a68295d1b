"""Locust: users who ask for completions and metrics, started by this script for a few seconds."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import KEY, PROMPT, URL, works

USERS = f"""
from locust import HttpUser, task

HEADERS = {{"Authorization": "Bearer {KEY}"}}


class Reader(HttpUser):
    @task(9)
    def complete(self):
        body = {{"prompt": "{PROMPT}", "max_tokens": 8}}
        self.client.post("/v1/completions", json=body, headers=HEADERS)

    @task
    def scrape(self):
        self.client.get("/metrics", headers=HEADERS)
"""


@works
def users_for_some_seconds() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "users.py"
        script.write_text(USERS, encoding="utf-8")
        ran = subprocess.run(
            [
                str(Path(sys.executable).parent / "locust"), "-f", str(script), "--headless",
                "-u", "4", "-r", "4", "-t", "10s", "--host", URL,
                "--csv", str(Path(folder) / "locust"), "--only-summary",
            ],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, (ran.stdout + ran.stderr)[-1800:]
        with (Path(folder) / "locust_stats.csv").open(encoding="utf-8") as rows:
            total = list(csv.DictReader(rows))[-1]
    assert int(total["Request Count"]) > 0
    assert int(total["Failure Count"]) == 0
