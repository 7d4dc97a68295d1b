"""The memory of an inspection: an upper bound of what it allocates, and its limit."""

import tracemalloc
from typing import Any

import pytest

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection import memory, responses, worker
from nanovllm.inspection.observe import InspectedModel

PROMPT = [7 * position % 260 for position in range(128)]
REQUESTS: dict[str, dict[str, Any]] = {
    "attention": {"prompt": PROMPT},
    "attention_head": {"prompt": PROMPT, "layer": 1},
    "overview": {"prompt": PROMPT},
    "logit_lens": {"prompt": PROMPT[:32], "top": 20},
    "ablation": {"prompt": PROMPT, "off": [{"layer": 1, "kind": "ffn"}]},
    "ablation_map": {"prompt": PROMPT},
    "embeddings": {"limit": 260},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_allocates_at_most_its_bound(model: InspectedModel, name: str) -> None:
    responses.run(model, name, REQUESTS[name])  # without what only the first call allocates
    tracemalloc.start()
    try:
        worker.encode(responses.run(model, name, REQUESTS[name]))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bound = memory.request_bytes(model.config, name, REQUESTS[name])
    bound += memory.layers_bytes(model.config)
    assert bound / 5 < peak_bytes < bound


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_above_the_limit_is_refused(model: InspectedModel, name: str) -> None:
    arguments = REQUESTS[name]
    num_bytes = memory.request_bytes(model.config, name, arguments)
    assert responses.run(model, name, arguments, num_bytes)
    message = f"needs {num_bytes} bytes of memory, the limit is {num_bytes - 1}; "
    with pytest.raises(InvalidRequestError, match=message + "(shorten|lower)") as caught:
        responses.run(model, name, arguments, num_bytes - 1)
    assert caught.value.param in arguments
