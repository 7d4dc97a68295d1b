"""What the operator of a server asks and changes while it runs."""

from collections.abc import Iterable

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.server.http.auth import ApiKeys
from nanovllm.server.http.worker_pools import WorkerPools


class ServerControl:
    """One server's API keys and worker threads, and whether it drains.

    Attributes:
        api_keys: the accepted keys; a server that started without keys checks none.
        work: the worker threads, which end with the engine.
        is_draining: /health answers 503 although requests are served, because the server is about
            to stop and load balancers should send their requests elsewhere.
    """

    def __init__(self, engine: AsyncEngine, api_keys: Iterable[str] = ()) -> None:
        self.api_keys = ApiKeys(api_keys)
        self.work = WorkerPools(engine.timeout_error)
        self.is_draining = False
        engine.when_stopped(self.work.close)
