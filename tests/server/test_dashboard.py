"""The dashboard, the alerts and docs/reference/metrics.md have what /metrics has, no more."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nanovllm.server.metrics import DRAFT_COUNTERS
from tests.support.serving import RunningServer

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
PAGE = ROOT / "docs" / "reference" / "metrics.md"
NOT_SHOWN = {
    "nanovllm:request_time_per_output_token_seconds",  # the time between tokens says the same
    "process_virtual_memory_bytes",
    "process_start_time_seconds",
    "process_max_fds",
}
WITH_DRAFTS = {f"nanovllm:{name}_total" for name in DRAFT_COUNTERS}  # on a server that drafts
HAS_PROCESS = sys.platform == "linux"
"""Whether prometheus_client knows the process's resources."""


def series(queries: Iterable[str]) -> set[str]:
    return {
        name
        for query in queries
        for name in re.findall(r"(?:nanovllm:|\bhttp_|\bprocess_)\w+", query)
        if HAS_PROCESS or not name.startswith("process_")
    }


def test_every_series_of_the_dashboard_and_the_alerts_exists(server: RunningServer) -> None:
    server.complete("the", max_tokens=2)
    families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    samples = {sample.name for family in families for sample in family.samples}
    shown = series(
        target["expr"]
        for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    )
    assert WITH_DRAFTS <= shown <= samples | WITH_DRAFTS
    assert series([ALERTS.read_text(encoding="utf-8")]) <= samples
    # A family's samples have its name and one of these endings.
    endings = ("", "_total", "_bucket", "_sum", "_count")
    left_out = {
        family.name
        for family in families
        if not family.name.endswith("_created")
        and shown.isdisjoint(family.name + ending for ending in endings)
    }
    assert left_out == {
        name for name in NOT_SHOWN if HAS_PROCESS or not name.startswith("process_")
    }


def test_every_series_is_documented_with_its_type(server: RunningServer) -> None:
    server.complete("the", max_tokens=1)
    exported = {
        family.name.removeprefix("nanovllm:")
        + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        if not family.name.endswith("_created")
    }
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (gauge|counter|histogram) \|", text, re.MULTILINE)
    documented = {
        name: kind for name, kind in rows if HAS_PROCESS or not name.startswith("process_")
    }
    assert len(rows) == len({name for name, _ in rows})
    with_drafts = [name.removeprefix("nanovllm:") for name in WITH_DRAFTS]
    assert documented == exported | dict.fromkeys(with_drafts, "counter")


def test_the_engines_of_all_replicas_are_summed() -> None:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            if "{{replica}}" in target["legendFormat"]:
                assert "(instance, job, replica)" in query  # a line for each process
            else:
                assert re.match(r"(sum|avg|count|histogram_quantile)\b", query), query


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for p in panels
        for g in [p["gridPos"]]
        for x in range(g["x"], g["x"] + g["w"])
        for y in range(g["y"], g["y"] + g["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
