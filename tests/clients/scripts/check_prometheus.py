"""Check /metrics with the official parser of Prometheus, for the names that a dashboard needs."""

import requests
from checks import KEY, URL, works
from prometheus_client.parser import text_string_to_metric_families


def scrape() -> dict[str, str]:
    answer = requests.get(f"{URL}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family.type for family in text_string_to_metric_families(answer.text)}


@works
def counters_gauges_and_histograms() -> None:
    types = scrape()
    assert types["nanovllm:prompt_tokens"] == "counter"
    assert types["nanovllm:num_requests_running"] == "gauge"
    assert types["nanovllm:e2e_request_latency_seconds"] == "histogram"


@works
def the_series_of_vllm() -> None:
    histograms = (
        "request_params_n request_params_max_tokens request_inference_time_seconds "
        "request_num_preemptions request_max_num_generation_tokens"
    )
    types = scrape()
    missing = [name for name in histograms.split() if f"nanovllm:{name}" not in types]
    assert not missing, f"missing: {missing}"
