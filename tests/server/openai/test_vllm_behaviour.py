"""Assertions of vLLM's own server tests, where nanovllm once answered otherwise.

The other cases of this kind are named test_vllm_* and stand beside what they test.
"""

from typing import Any

from tests.support.serving import RunningServer, wait_until

PROMPT_IDS = [5, 9, 3, 17, 8, 44, 2, 30, 21]


def growth(server: RunningServer, requests: int, **body: Any) -> dict[str, float]:
    """Return by how much each series grows by requests that are sent one after another."""
    wait_until(server.is_idle)
    before = server.samples()
    for _ in range(requests):
        server.complete(PROMPT_IDS, **body)
    count = "e2e_request_latency_seconds_count"
    wait_until(lambda: server.samples()[count] - before[count] == requests)
    wait_until(server.is_idle)
    after = server.samples()
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def test_the_counts_of_metrics_are_those_of_vllm(server: RunningServer) -> None:
    requests, tokens = 10, 10
    grown = growth(server, requests, max_tokens=tokens, ignore_eos=True)
    prompt = requests * len(PROMPT_IDS)
    generated = requests * tokens
    once_a_request = (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
        "request_params_n", "request_params_max_tokens", "request_time_per_output_token_seconds",
        "request_max_num_generation_tokens",
    )  # fmt: skip
    expected = {
        **{f"{name}_count": requests for name in once_a_request},
        "inter_token_latency_seconds_count": generated - requests,
        "request_prompt_tokens_sum": prompt,
        "request_generation_tokens_sum": generated,
        "request_params_n_sum": requests,
        "request_params_max_tokens_sum": generated,
        "iteration_tokens_total_sum": prompt + generated,
        "iteration_tokens_total_count": generated,
        "prompt_tokens_total": prompt,
        "generation_tokens_total": generated,
        "request_success_total{finished_reason=length}": requests,
    }
    assert {name: grown.get(name) for name in expected} == expected
