"""A reader holds one frame at most."""

import asyncio

from nanovllm.server.inspector.state_feed import _frames, _put
from tests.support.async_engines import run


def test_a_slow_reader_gets_the_newest_frame_and_the_end() -> None:
    async def test() -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        for frame in (b"first", b"second", b"third"):
            _put(queue, frame)
        assert [frame async for frame in _frames(queue, 1)] == [b"third"]
        _put(queue, b"late")
        _put(queue, None)
        _put(queue, b"after the end")
        assert [frame async for frame in _frames(queue)] == []
        assert [frame async for frame in _frames(queue, 0)] == []

    run(test)
