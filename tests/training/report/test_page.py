"""The page: complete, offline, escaped, bounded, and written at once."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.report import load_run, render_report, write_page, write_report
from tests.support.training_runs import INFO, metrics, write_run

SAMPLES = [{"step": step, "text": f"text of step {step}"} for step in (0, 20)]
VOID_TAGS = {"meta", "input"}


class Page(HTMLParser):
    """The elements of a page; its tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements with this tag and these attributes."""
        return [
            found
            for name, found in self.elements
            if name == tag and attributes.items() <= found.items()
        ]


def page_of(folder: Path, *args: Any, **settings: Any) -> Page:
    return Page(render_report([load_run(write_run(folder, *args, **settings))]))


def lines_of(page: Page, name: str) -> list[dict[str, str | None]]:
    return page.all("path", **{"data-name": name})


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    page = page_of(tmp_path / "small", metrics([0, 20, 40]), SAMPLES)
    assert page.texts["h1"] == ["small"]
    tiles = dict(zip(page.texts["dt"], page.texts["dd"], strict=False))
    assert tiles["Best validation loss"] == "2.0000"
    text = [one for texts in page.texts.values() for one in texts]
    for shown in ("7.39", "1.443", "123k", "4,000", "4.0 s", "2 layers, 32 wide", "a.txt, b.txt",
                  "\ntext of step 20", "Step 20 · validation loss 3.0000"):  # fmt: skip
        assert any(shown in one for one in text), shown
    assert f"nanovllm serve {tmp_path / 'small'}" in page.texts["code"]
    titles = page.texts["h3"]
    assert titles[:4] == ["Loss", "Learning rate", "Gradient norm", "Throughput"]
    assert {"step", "tokens", "time (seconds)", "nats per token"} <= set(page.texts["p"])


def test_lines_have_the_values(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics([0, 20, 40]))
    over_steps = lines_of(page, "validation")[0]
    assert (over_steps["data-x"], over_steps["data-y"]) == ("0 20 40", "4 3 2")
    assert re.fullmatch(r"M0\.0 [\d.]+L500\.0 [\d.]+L1000\.0 [\d.]+", over_steps["d"] or "")


def test_a_missing_value_is_a_gap_and_a_lone_point_a_dot(tmp_path: Path) -> None:
    rows = metrics(range(0, 700, 10))  # too many for markers
    rows[1]["val_loss"] = rows[3]["val_loss"] = None
    page = page_of(tmp_path, rows)
    line = lines_of(page, "validation")[0]
    assert (line["data-x"] or "").startswith("0 20 40 50 ")
    assert (line["d"] or "").count("M") == 1
    dots = [path for path in page.all("path") if "single" in (path["class"] or "")]
    assert (dots[0]["d"] or "").count("h.01") == 2


def test_few_evaluations_are_markers(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics([0, 10, 20]))
    dots = [path for path in page.all("path") if "color-0" in (path["class"] or "")]
    assert any((path["d"] or "").count("h.01") == 3 for path in dots)


def test_the_curves_have_the_records_of_updates(tmp_path: Path) -> None:
    """Tokens and time are interpolated; updates after the last evaluation have neither."""
    updates = [
        {"step": step, "train_loss": 5.0 - step, "lr": step / 10, "grad_norm": 2.0}
        for step in (0, 1, 3, 5)
    ]
    page = page_of(tmp_path / "run", metrics([0, 4]), updates=updates)
    drawn = [(line["data-x"], line["data-y"]) for line in lines_of(page, "training, one step")]
    assert drawn == [
        ("0 1 3 5", "5 4 2 0"), ("0 100 300", "5 4 2"), ("0 0.1 0.3", "5 4 2")
    ]  # fmt: skip
    assert lines_of(page, "training, mean since the last evaluation")[0]["d"] == ""
    assert [(line["data-x"], line["data-y"]) for line in lines_of(page, "run")][:2] == [
        ("0 1 3 5", "0 0.1 0.3 0.5"), ("0 1 3 5", "2 2 2 2")
    ]  # fmt: skip
    assert any("mean over the steps since" in text for text in page.texts["p"])


def test_settings_with_their_defaults_are_marked(tmp_path: Path) -> None:
    page = page_of(tmp_path, info={**INFO, "defaults": ["lr"]})
    assert [text for text in page.texts["span"] if "default" in text] == [" default"]
    cells = page.texts["td"]
    assert "0.001" in cells
    assert "defaults" not in page.texts["th"]


def test_the_prompt_of_a_sample_is_marked(tmp_path: Path) -> None:
    samples = [{"step": 0, "text": "She <sells", "prompt": "She <"}]
    page = page_of(tmp_path / "a", metrics([0]), samples)
    assert page.texts["mark"] == ["marked", "She <"]
    assert page.texts["pre"] == ["\n", "sells"]
    samples[0]["prompt"] = "not its beginning"
    assert "mark" not in page_of(tmp_path / "b", metrics([0]), samples).texts


def test_a_single_evaluation_is_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics([0]))
    assert lines_of(page, "validation")[0]["data-y"] == "4"


def test_a_run_without_evaluations_is_shown(tmp_path: Path) -> None:
    page = page_of(tmp_path, info={**INFO, "state": "running"})
    assert page.texts["p"].count("No values yet.") == 4
    assert "code" not in page.texts  # there is no checkpoint to serve


def test_the_page_loads_nothing_and_allows_only_its_own_script(tmp_path: Path) -> None:
    text = render_report([load_run(write_run(tmp_path, metrics([0, 20]), SAMPLES))])
    page = Page(text)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        content = "".join(page.texts[tag])
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
        assert len(page.all(tag)) == 1
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "style", "action", "srcset"}
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(", text)


@pytest.mark.parametrize("count", [1, 2])
def test_untrusted_text_is_escaped(tmp_path: Path, count: int) -> None:
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\0\x1b\ud800"
    info = {
        "config": {hostile: hostile, "steps": hostile},
        "model": {"parameters": hostile, "list": [hostile]},
        "state": hostile,
        "message": hostile,
        hostile: {hostile: hostile},
    }
    runs = [
        load_run(
            write_run(
                tmp_path / f"<b>{number}&",
                metrics([0, 20]),
                [{"step": 20, "text": hostile}],
                {**info, "seed": number},
            )
        )
        for number in range(count)
    ]
    text = render_report(runs)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not page.all("b")
    assert "\0" not in text
    text.encode("utf-8")
    samples = "".join(page.texts["pre"])
    assert samples.count("<script>alert(1)</script>") == count
    assert "\ufffd" in samples


@pytest.mark.parametrize(
    ("state", "reloads"),
    [("running", True), ("finished", False), ("stopped", False), ("failed", False)],
)
def test_only_a_running_run_reloads(tmp_path: Path, state: str, reloads: bool) -> None:
    info = {**INFO, "state": state, "message": "loss is NaN"}
    page = page_of(tmp_path, metrics([0, 20]), info=info)
    assert bool(page.all("meta", **{"http-equiv": "refresh"})) == reloads
    assert state.capitalize() in page.texts["span"]
    assert "loss is NaN" in page.texts["p"]
    assert page.all("progress")[0] == {
        "max": "40", "value": "20", "class": state, "aria-label": "progress of the run in steps"
    }  # fmt: skip
    resumes = [command for command in page.texts["code"] if "--resume" in command]
    assert bool(resumes) == (state != "finished")


def test_a_long_run_gives_a_bounded_page(tmp_path: Path) -> None:
    rows = metrics(range(5000))
    rows[1234]["val_loss"] = 77.0  # a spike is not lost
    samples = [{"step": step, "text": "x" * 10_000} for step in range(0, 5000, 50)]
    info = {**INFO, "config": {f"setting {number}": "v" * 5000 for number in range(2000)}}
    page = page_of(tmp_path, rows, samples, info)
    line = lines_of(page, "validation")[0]
    assert len((line["data-x"] or "").split()) <= 400
    assert "77" in (line["data-y"] or "").split()
    assert len(page.all("article")) == 50
    assert max(map(len, page.texts["pre"])) <= 4002
    write_report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_several_runs_are_compared(tmp_path: Path) -> None:
    other = {**INFO, "config": {**INFO["config"], "lr": 3e-3}}
    folders = [
        write_run(tmp_path / "a" / "run", metrics([0, 40]), SAMPLES),
        write_run(tmp_path / "b" / "run", metrics([0, 20]), SAMPLES, other),
    ]
    page = Page(render_report([load_run(folder) for folder in folders]))
    names = ["a/run", "b/run"]
    assert page.texts["h1"] == ["2 runs compared"]
    for chart in ("Validation loss", "Training loss", "Learning rate"):
        assert chart in page.texts["h3"]
    assert [lines_of(page, name)[0]["data-y"] for name in names] == ["4 2", "4 3"]
    assert {lines_of(page, name)[0]["class"] for name in names} == {
        "line color-0 dash-0", "line color-1 dash-0"
    }  # fmt: skip
    assert page.texts["strong"] == ["2.0000", "1.443"]
    cells = page.texts["td"]
    assert cells[cells.index("0.001") + 1] == "0.003"
    assert "lr" in page.texts["th"]
    assert "layers" not in page.texts["th"]
    assert f"nanovllm serve {folders[0]}" in page.texts["code"]
    assert not page.all("meta", **{"http-equiv": "refresh"})


def test_losses_of_different_tokenizers_are_compared_per_byte(tmp_path: Path) -> None:
    other = {**INFO, "data": {"validation_tokens": 250, "validation_bytes": 1000}}
    runs = [
        load_run(write_run(tmp_path / "char", metrics([0, 20]))),
        load_run(write_run(tmp_path / "bpe", metrics([0, 20]), info=other)),
    ]
    page = Page(render_report(runs))
    assert [lines_of(page, name)[0]["data-y"] for name in ("char", "bpe")] == [
        "2.8854 2.164", "1.4427 1.082"
    ]  # fmt: skip
    assert page.texts["strong"] == ["1.082"]
    assert "bits per byte" in page.texts["p"]


def test_the_message_of_a_finished_run_says_why_it_ended_early(tmp_path: Path) -> None:
    info = {**INFO, "message": "no lower loss in 5 evaluations"}
    assert info["message"] in page_of(tmp_path / "early", metrics([0, 20]), info=info).texts["p"]
    assert info["message"] not in page_of(tmp_path, metrics([0, 40]), info=info).texts["p"]


def test_each_compared_run_has_a_line_with_its_state(tmp_path: Path) -> None:
    infos = [INFO, {**INFO, "state": "failed", "message": "the loss is NaN"}]
    folders = [
        write_run(tmp_path / str(number), metrics([0, 20]), info=info)
        for number, info in enumerate(infos)
    ]
    text = render_report(list(map(load_run, folders)))
    header = text[text.index("<header>") : text.index("</header>")]
    items = re.findall(r"<li>.*?</li>", header)
    assert [re.findall(r"run-name\">(.*?)<", item)[0] for item in items] == ["0", "1"]
    assert ["Finished" in item for item in items] == [True, False]
    assert "Failed" in items[1]
    assert "the loss is NaN" in items[1]


def test_a_learning_rate_far_above_the_others_is_named_not_drawn(tmp_path: Path) -> None:
    names = ["low", "wild", "high"]
    rates = dict(zip(names, [1e-4, 1e9, 1e-3], strict=True))
    runs = [
        load_run(write_run(tmp_path / name, metrics([0, 20], lr=rate)))
        for name, rate in rates.items()
    ]
    page = Page(render_report(runs))
    assert [len(lines_of(page, name)) for name in names] == [9, 8, 9]
    assert "Not drawn, far above the others: wild (up to 1,000,000,000)." in page.texts["p"]


@pytest.mark.parametrize("count", [0, 25])
def test_the_number_of_runs_is_bounded(tmp_path: Path, count: int) -> None:
    run = load_run(write_run(tmp_path, metrics([0])))
    with pytest.raises(TrainingError, match=f"1 to 24 runs, not {count}"):
        render_report([run] * count)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_run(tmp_path, metrics([0]))
    write_report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_page("\ud800", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl", "report.html", "run.json"
    ]  # fmt: skip
