"""What is before the replicas: Ray Serve's proxies and the ingress, and the time that they take.

Each is a Python process, which does one thing after the other. A request takes time of its proxy
and of its ingress, and so does each token of its stream on the way back; tokens of one step are
sent together.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FrontCost:
    """CPU seconds of the proxy and the ingress for each request, and for each streamed token."""

    proxy_request: float = 0.0
    proxy_token: float = 0.0
    ingress_request: float = 0.0
    ingress_token: float = 0.0

    def ingress_capacity(self, output_tokens: float) -> float:
        """Return the streams per second of one ingress that is always busy."""
        return 1 / (self.ingress_request + output_tokens * self.ingress_token)

    def save(self, path: Path) -> None:
        """Write the costs as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "FrontCost":
        """Read what `save` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Core:
    """A process in simulated time, for which work waits in order of arrival."""

    def __init__(self) -> None:
        """Create an idle process."""
        self.busy_s = 0.0
        self._free_s = 0.0

    def run(self, now_s: float, seconds: float) -> float:
        """Return the time at which work of `seconds` that arrives now is done."""
        self.busy_s += seconds
        self._free_s = max(self._free_s, now_s) + seconds
        return self._free_s
