"""A reader holds one frame at most, and the fast JSON of a step is that of its document."""

import asyncio
import json

from nanovllm.engine.inspection.recorder import StepRecorder
from nanovllm.server.inspector.documents import step_document, step_json
from nanovllm.server.inspector.event_stream import StateReader, _put
from tests.support.async_engines import run
from tests.support.scheduling import make_group, make_request, make_scheduler, record_step


def test_a_slow_reader_gets_the_newest_frame_and_the_end() -> None:
    async def test() -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        reader = StateReader(queue, lambda: None)
        for frame in (b"first", b"second", b"third"):
            _put(queue, frame)
        assert [frame async for frame in reader.frames(1)] == [b"third"]
        _put(queue, b"late")
        _put(queue, None)
        _put(queue, b"after the end")
        assert [frame async for frame in reader.frames()] == []
        assert [frame async for frame in reader.frames(0)] == []

    run(test)


def test_the_json_of_a_step_is_that_of_its_document() -> None:
    scheduler = make_scheduler(tokens=8)
    scheduler.observer = recorder = StepRecorder(scheduler, 0)
    for request in (*make_group('of "choices"', 12, 2, new=3), make_request("other", 9, new=8)):
        scheduler.add(request)
    while scheduler.has_work:
        record_step(scheduler, recorder)
    records = recorder.last(100)
    kinds = {each.kind for record in records for each in record.sequences}
    assert kinds == {"chunk", "prefill", "decode", "fork"}
    assert any(len(record.decoding) == 3 for record in records)
    names: dict[object, list[str]] = {}
    for record in records:
        assert json.loads(step_json(record, 0.5, names)) == step_document(record, 0.5)
    plain = [record for record in records if record.decoding and not any(record.events)]
    assert len(plain) > 1
    assert names.keys() == {record.decoding for record in plain}
