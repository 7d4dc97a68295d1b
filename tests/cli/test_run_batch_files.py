"""The files of `nanovllm run-batch`: invalid input, resuming, and a full disk."""

import errno
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.batch.input import BatchInput, CustomIds, digest_of
from nanovllm.batch.output import Answer, AnswerFile, open_answers
from nanovllm.cli.main import build_parser
from nanovllm.server.service import ServerSettings
from tests.support.batch_files import (
    arguments,
    read_answers,
    request_line,
    run_batch,
    write_requests,
)

NO_MODEL = Path("./not/there")
"""What is found before any work is found without a model."""

LINE = json.dumps(request_line("a")).encode()

BAD_INPUTS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{}{\n", "line 1 cannot be read as JSON: Extra data"),
    "not UTF-8": (
        LINE + b"\n\n" + LINE.replace(b'"the"', b'"\xff"'),
        "line 3 cannot be read as JSON: 'utf-8' codec",
    ),
    "nested too deeply": (b"[" * 200_000, "line 1 cannot be read as JSON"),
    "a number of thousands of digits": (
        b"1" * 5000,
        "line 1 cannot be read as JSON: Exceeds the limit",
    ),
    "no object": (b"[1]\n", "line 1 is not an object"),
    "no id": (
        b'{"method": "POST"}',
        "line 1 has no custom_id; give it a text of 1 to 512 characters",
    ),
    "an id that is no text": (b'{"custom_id": 5}', "line 1 has the custom_id 5; give it a text"),
    "an empty id": (b'{"custom_id": ""}', "line 1 has the custom_id ''; give it a text"),
    "an id that is too long": (
        json.dumps({"custom_id": "x" * 513}).encode(),
        "line 1 has the custom_id 'xxx",
    ),
    "an id twice": (
        LINE + b"\n\n" + LINE + b"\n",
        "line 3 has the custom_id 'a' of line 1; each must be unique",
    ),
    "an id thrice": (
        LINE + b"\n" + LINE + b"\n" + LINE,
        "line 3 has the custom_id 'a' of line 1; each must be unique",
    ),
    "a line that is too long": (
        LINE + b"\n" + b" " * 5000 + LINE,
        "line 2 is longer than the limit of 4096 bytes; split it, or raise --max-line-bytes",
    ),
    "another id in other writing": (
        LINE + b"\n" + LINE.replace(b'"a"', b'"\\u0061"'),
        "line 2 has the custom_id 'a' of line 1",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_an_invalid_input_is_an_error_before_any_request(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BAD_INPUTS[name]
    (tmp_path / "in.jsonl").write_bytes(content)
    limit = "300000" if "nested" in name or "digits" in name else "4096"
    assert (
        run_batch(
            NO_MODEL, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--max-line-bytes", limit
        )
        == 1
    )
    errors = capsys.readouterr().err
    assert message in errors
    assert "nothing was run" in errors
    assert "Traceback" not in errors
    assert len(errors) < 1500
    assert not (tmp_path / "out.jsonl").exists()


def test_only_the_first_faults_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([LINE, LINE, *[b"x"] * 50]))
    assert run_batch(NO_MODEL, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 1
    listed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  line")]
    assert [line.split()[1] for line in listed] == [str(number) for number in range(3, 13)]


def test_a_line_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    for content in (LINE, LINE + b"\n", LINE + b"\n\n"):
        (tmp_path / "in.jsonl").write_bytes(content)
        for limit, is_allowed in ((len(LINE), True), (len(LINE) - 1, False)):
            with (tmp_path / "in.jsonl").open("rb") as file:
                batch = BatchInput(tmp_path / "in.jsonl", file, limit)
                if is_allowed:
                    assert [request.custom_id for request in batch.requests(batch.check())] == ["a"]
                else:
                    with pytest.raises(ValueError, match="longer than the limit"):
                        batch.check()


def test_the_limit_is_that_of_the_server() -> None:
    assert (
        build_parser().parse_args(["run-batch", "-i", "a", "-o", "b"]).max_line_bytes
        == ServerSettings(model_names=("a",)).max_body_bytes
    )


def test_neither_many_lines_nor_a_huge_one_are_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for i in range(20_000):
            file.write(json.dumps(request_line(str(i), {"prompt": "x" * 500})).encode() + b"\n")
    with path.open("rb") as file:
        batch = BatchInput(path, file, 1 << 20)
        tracemalloc.start()
        assert sum(1 for _ in batch.requests(batch.check())) == 20_000
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 2_000_000 < path.stat().st_size / 5
    with path.open("ab") as file:
        file.write(b"x" * 20_000_000)
    with path.open("rb") as file:
        tracemalloc.start()
        with pytest.raises(ValueError, match="line 20001 is longer"):
            BatchInput(path, file, 1 << 20).check()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 6_000_000


def test_an_input_that_changes_during_the_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    for later in ([], ["a"], ["a", "c"], ["a", "b", "c"]):
        write_requests(path, [request_line("a"), request_line("b")])
        with path.open("rb") as file:
            batch = BatchInput(path, file, 4096)
            ids = batch.check()
            write_requests(path, [request_line(custom_id) for custom_id in later])
            with pytest.raises(ValueError, match=r"in\.jsonl was changed while it was read"):
                list(batch.requests(ids))


@given(
    st.lists(st.text(min_size=1, max_size=4), unique=True),
    st.lists(st.text(min_size=1, max_size=4)),
)
def test_each_id_is_taken_once(known: list[str], asked: list[str]) -> None:
    ids = CustomIds(b"".join(map(digest_of, known)))
    assert not ids.repeated
    free = set(known)
    for custom_id in asked + known:
        if custom_id in known:
            assert ids.take(custom_id) is (custom_id in free)
            free.discard(custom_id)
        else:
            with pytest.raises(KeyError):
                ids.take(custom_id)
        assert ids.num_taken == len(known) - len(free)


def ids_of(*names: str) -> CustomIds:
    return CustomIds(b"".join(map(digest_of, names)))


ANSWERS = [
    Answer.response("a", 200, {"text": "é\n\u2028"}),
    Answer.refusal("b", "unsupported_url", "no"),
    Answer.response("c", 400, {}),
]


def test_wherever_it_was_cut_off_whole_answers_stay_and_the_rest_goes(tmp_path: Path) -> None:
    whole = b"".join(answer.line for answer in ANSWERS)
    path = tmp_path / "out.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ids = ids_of("a", "b", "c", "d")
        kept = whole[: whole[:cut].rfind(b"\n") + 1]
        with open_answers(path, ids) as answers:
            assert path.read_bytes() == kept
            assert ids.num_taken == kept.count(b"\n")
            answers.append(Answer.response("d", 200, {}).line)
        assert read_answers(path).keys() == {
            "d",
            *[answer.custom_id for answer in ANSWERS[: kept.count(b"\n")]],
        }


FOREIGN_OUTPUTS: dict[str, tuple[bytes, str]] = {
    "an id of another input": (
        ANSWERS[0].line + Answer.response("x", 200, {}).line,
        "line 2 of .* answers 'x', which the input does not have",
    ),
    "an answer twice": (ANSWERS[0].line * 2, "line 2 of .* answers 'a' a second time"),
    "requests": (LINE + b"\n", "line 1 of .* is no answer"),
    "text": (b"Dear diary,\n", "line 1 of .* is no answer"),
    "text without an end": (b"Dear diary,", "is no output of a batch"),
    "JSON without an end": (b'{"id": 5}', "is no output of a batch"),
    "a blank line": (ANSWERS[0].line + b"\n" + ANSWERS[1].line, "line 2 of .* is no answer"),
    "zeros": (ANSWERS[0].line + b"\0" * 9 + b"\n", "line 2 of .* is no answer"),
    "an id that is no text": (ANSWERS[0].line.replace(b'"a"', b"[]"), "line 1 of .* is no answer"),
}


@pytest.mark.parametrize("name", FOREIGN_OUTPUTS)
def test_an_output_of_something_else_is_left_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = FOREIGN_OUTPUTS[name]
    requests = write_requests(tmp_path / "in.jsonl", [request_line("a"), request_line("b")])
    output = tmp_path / "out.jsonl"
    output.write_bytes(content)
    with pytest.raises(ValueError, match=message), open_answers(output, ids_of("a", "b")):
        pytest.fail("it was opened")
    assert run_batch(NO_MODEL, requests, output) == 1
    errors = capsys.readouterr().err
    assert "choose another output, or give --overwrite to discard its lines" in errors
    assert "Traceback" not in errors
    assert output.read_bytes() == content


def test_the_input_may_not_be_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write_requests(tmp_path / "in.jsonl", [request_line("a")])
    (tmp_path / "link").symlink_to(requests)
    before = requests.read_bytes()
    for output in (requests, tmp_path / "link"):
        assert run_batch(NO_MODEL, requests, output, "--overwrite") == 1
        assert "is the input and the output" in capsys.readouterr().err
    assert requests.read_bytes() == before


def test_unusable_paths_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write_requests(tmp_path / "in.jsonl", [request_line("a")])
    for wrong, message in (
        ((tmp_path / "none.jsonl", tmp_path / "out"), "none.jsonl"),
        ((tmp_path, tmp_path / "out"), "is not a regular file"),
        ((Path(os.devnull), tmp_path / "out"), "is not a regular file"),
        ((requests, tmp_path), str(tmp_path)),
        ((requests, tmp_path / "not" / "there"), "there"),
    ):
        assert run_batch(NO_MODEL, *wrong) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("nanovllm: ")
        assert message in errors
        assert "Traceback" not in errors


def test_two_runs_do_not_write_to_one_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write_requests(tmp_path / "in.jsonl", [request_line("a"), request_line("b")])
    output = tmp_path / "out.jsonl"
    with open_answers(output, ids_of("a", "b")) as answers:
        answers.append(ANSWERS[0].line[:10])
        assert run_batch(NO_MODEL, requests, output) == 1
        assert f"another run writes to {output}" in capsys.readouterr().err
        assert output.read_bytes() == ANSWERS[0].line[:10], (
            "a line that another run has begun is not torn"
        )


class FullDisk(io.FileIO):
    """A file on a disk with room for `room_bytes` more."""

    room_bytes = 0

    def write(self, data: "memoryview[int]") -> int:  # type: ignore[override]
        """Write what has room; as on a disk, an error comes only where none of it has."""
        if not self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(data[: self.room_bytes])
        self.room_bytes -= written
        return written


def append_all(answers: AnswerFile, lines: list[bytes]) -> None:
    for line in lines:
        answers.append(line)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = [answer.line for answer in ANSWERS]
    for room_bytes in range(len(b"".join(lines))):
        path.unlink(missing_ok=True)
        with FullDisk(path, "ab") as file:
            file.room_bytes = room_bytes
            answers = AnswerFile(path, file)
            with pytest.raises(
                OSError,
                match=(
                    r"out\.jsonl cannot be written \(No space left on device\); "
                    r"its responses are kept: fix"
                ),
            ) as caught:
                append_all(answers, lines)
            answers.sync()
        assert caught.value.errno == errno.ENOSPC
        content = path.read_bytes()
        assert content == b"".join(lines)[: b"".join(lines)[:room_bytes].rfind(b"\n") + 1]
        ids = ids_of("a", "b", "c")
        with open_answers(path, ids) as resumed:
            append_all(resumed, lines[ids.num_taken :])
        assert path.read_bytes() == b"".join(lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full_ends_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write_requests(tmp_path / "in.jsonl", [request_line("a")])
    assert run_batch(tiny_model, requests, Path("/dev/full")) == 1
    errors = capsys.readouterr().err
    assert "/dev/full cannot be written (No space left on device)" in errors
    assert "Traceback" not in errors


def test_a_device_has_no_answers_to_go_on_with(tiny_model: Path, tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in.jsonl", [request_line("a")])
    assert run_batch(tiny_model, requests, Path(os.devnull)) == 0
    assert not Path(f"{os.devnull}.lock").exists()


def test_the_output_is_synced_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    path = tmp_path / "out.jsonl"
    with path.open("ab", buffering=0) as file:
        answers = AnswerFile(path, file, clock=lambda: now_s)
        for later_s, expected in ((0.0, 0), (0.9, 0), (1.0, 1), (1.9, 1), (2.1, 2)):
            now_s = 100.0 + later_s
            answers.append(ANSWERS[0].line)
            answers.sync(only_if_due=True)
            assert len(synced) == expected
        answers.sync()
        assert len(synced) == 2, "nothing was written since"
        answers.append(ANSWERS[0].line)
        answers.sync()
        assert len(synced) == 3


def test_flags_are_those_of_the_engine() -> None:
    parsed = build_parser().parse_args(
        arguments(Path("gpt2"), Path("a"), Path("b"), "--max-num-seqs", "3")
    )
    assert (parsed.model, parsed.input, parsed.output, parsed.max_num_seqs, parsed.overwrite) == (
        "gpt2",
        Path("a"),
        Path("b"),
        3,
        False,
    )


def test_pipes_may_be_input_and_output(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(request_line(str(number))) for number in range(3)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert run_batch(tiny_model, Path("-"), Path("-")) == 0
    captured = capfd.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == ["0", "1", "2"]
    assert "3 requests answered" in captured.err
    assert captured.err.rstrip().endswith("; standard output")


def test_wrong_lines_of_a_pipe_are_those_of_standard_input(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}\n")))
    assert run_batch(NO_MODEL, Path("-"), Path("-")) == 1
    assert "standard input cannot be run as it is" in capfd.readouterr().err


def test_no_folder_is_made_for_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINE)
    assert run_batch(NO_MODEL, tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl") == 1
    errors = capsys.readouterr().err
    assert f"there is no folder {tmp_path / 'new'} for out.jsonl; create it" in errors
    assert not (tmp_path / "new").exists()
