"""`nanovllm list`, `show`, `remove` and `env`."""

import io
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from nanovllm.cli.env import shown_variables
from nanovllm.cli.main import main
from nanovllm.hub import inventory
from nanovllm.hub.inventory import HUB_CACHE, RemovalError, StoredItem, remove_item
from nanovllm.model.kernels.build.peak import keep_findings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def machine(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a download, three models in the hub's cache, and compiled kernels.

    The three have the same commit, as a fork has; one can not be loaded.
    """
    cache = tmp_path / "hub"
    for name, model_type in (("tale", "gpt2"), ("kin", "mistral"), ("other", "opt")):
        repo = cache / f"models--owner--{name}"
        snapshot = repo / "snapshots" / COMMIT
        shutil.copytree(tiny_model, snapshot)
        config = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        (repo / "blobs").mkdir()
    shutil.copytree(tiny_model, tmp_path / "models" / "mine")
    info = {"repo": "owner/mine", "revision": COMMIT}
    (tmp_path / "models" / "mine" / "model_info.json").write_text(json.dumps(info))
    kernels = tmp_path / "cache" / "kernels"
    kernels.mkdir(parents=True)
    for file in ("a.kernels", "a.lock", "notes.txt"):
        (kernels / file).write_bytes(b"x" * 2048)
    monkeypatch.setenv("NANOVLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_has_everything_that_nanovllm_can_load(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [
        ["tiny-books", "bundled"], ["tiny-books-draft", "bundled"],
        ["./models/mine", "download"], ["owner/kin", "hub"], ["owner/tale", "hub"],
        ["kernels", "compiled"],
    ]  # fmt: skip
    assert rows[-1][2:4] == ["2.0", "KiB"]


def test_an_empty_machine_has_the_bundled_models(
    machine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("hub", "models", "cache"):
        shutil.rmtree(machine / folder)
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "NAME", "tiny-books", "tiny-books-draft", "kernels",
    ]  # fmt: skip
    assert not (machine / "cache").exists(), "looking makes no folder"


@pytest.mark.parametrize("name", ["owner/tale", "./models/mine"])
def test_show_prints_the_configuration(
    machine: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    assert "layers         2" in out
    assert "model.safetensors" in out
    assert ("owner/mine, revision 0123456789ab" in out) == (name == "./models/mine")


@pytest.mark.parametrize(
    ("text", "shown"),
    [('{"chat_template": null}', "no"), ('{"chat_template": "{{ x }}"}', "yes"), ("[", "models")],
)
def test_show_says_whether_there_is_a_chat_template(
    machine: Path, capsys: pytest.CaptureFixture[str], text: str, shown: str
) -> None:
    (machine / "models" / "mine" / "tokenizer_config.json").write_text(text)
    assert main(["show", "./models/mine"]) == 0
    assert f"chat template  {shown}" in capsys.readouterr().out


def test_show_lists_the_kernels(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "kernels"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "FILE", "a.kernels",
    ]  # fmt: skip


def test_what_was_measured_is_no_kernel_and_is_removed_with_them(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keep_findings("speeds", lambda: {"float32": 2}) == {"float32": 2}
    assert keep_findings("speeds", pytest.fail) == {"float32": 2}
    (kept,) = (machine / "cache" / "kernels").glob("*.measured")
    assert main(["show", "kernels"]) == main(["list"]) == main(["env"]) == 0
    shown = capsys.readouterr().out
    assert kept.stem not in shown
    assert shown.count("2.0 KiB") == 3, "of the only kernels, a.kernels"
    assert main(["remove", "kernels", "--yes"]) == 0
    assert not kept.exists()


def test_show_does_not_ask_the_hub(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanovllm.hub.repo.fetch_snapshot", pytest.fail)
    assert main(["show", "gpt2"]) == 1
    told = capsys.readouterr().err
    assert told == "nanovllm: gpt2 is not on this machine; nanovllm download gpt2 fetches it\n"


def test_remove_removes_only_named_items(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remove", "owner/tale", "kernels", "--yes"]) == 0
    assert "removed owner/tale (" in capsys.readouterr().out
    left = {path.name for path in (machine / "hub").iterdir()} - {".locks"}
    assert left == {"models--owner--kin", "models--owner--other"}
    assert [path.name for path in (machine / "cache" / "kernels").iterdir()] == ["notes.txt"]
    assert (machine / "models" / "mine" / "config.json").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-books", "part of nanovllm"),
        ("./models/mine", "remove it yourself"),
        ("models/mine", "remove it yourself"),
        ("owner/other", "there is no owner/other to remove"),
        ("../hub", "there is no ../hub"),
    ],
)
def test_bundled_models_and_user_folders_are_never_removed(
    machine: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    before = sorted(machine.rglob("*"))
    for arguments in ([name], ["kernels", name, "--yes"]):  # without a question, and before others
        assert main(["remove", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert sorted(machine.rglob("*")) == before


def test_a_link_out_of_the_cache_is_not_followed(machine: Path) -> None:
    outside = machine / "outside"
    shutil.move(machine / "hub" / "models--owner--tale", outside)
    link = machine / "hub" / "models--owner--tale"
    link.symlink_to(outside)
    for folder in (link, outside):
        with pytest.raises(RemovalError, match="remove it yourself"):
            remove_item(StoredItem("owner/tale", HUB_CACHE, folder, 0, None))
    assert (outside / "snapshots" / COMMIT / "config.json").is_file()


@pytest.mark.parametrize(("answer", "is_removed"), [("y\n", True), ("n\n", False), ("", False)])
def test_remove_asks(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    is_removed: bool,
) -> None:
    stdin = io.StringIO(answer)
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["remove", "kernels"]) == 1
    assert "give --yes" in capsys.readouterr().err
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    assert main(["remove", "kernels"]) == (0 if is_removed else 1)
    assert (machine / "cache" / "kernels" / "a.kernels").exists() is not is_removed
    assert "Remove kernels (2.0 KiB)" in capsys.readouterr().out


def test_a_failed_removal_is_an_error(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.shutil.rmtree", lambda path: None)
    assert main(["remove", "owner/tale", "--yes"]) == 1
    assert "could not be removed completely" in capsys.readouterr().err
    assert inventory.stored_items()


def test_env_has_versions_and_no_secrets(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", "secret-1")
    monkeypatch.setenv("HF_TOKEN", "secret-2")
    refusals = {"bfloat16": "vectors are as fast", "int8": ""}
    monkeypatch.setattr("nanovllm.model.kernels.build.amx.tile_refusals", lambda *_: refusals)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for label in (
        "nanovllm ",
        "Python ",
        "processor ",
        "memory ",
        "kernels ",
        "hub cache ",
        "numba ",
    ):
        assert any(line.startswith(label) for line in out.splitlines()), label
    assert f"{machine / 'cache' / 'kernels'}, can be written, 1 file, 2.0 KiB" in out
    assert "NANOVLLM_API_KEY=(set, not shown)" in out
    assert "secret" not in out
    assert "AMX tiles of bfloat16 (not used: vectors are as fast), AMX tiles of int8\n" in out


def test_only_values_that_are_known_to_be_public_are_shown() -> None:
    actual = shown_variables(
        {
            "HF_ENDPOINT": "https://user:secret@mirror.example/x",
            "HF_SOMETHING_NEW": "secret",
            "NANOVLLM_CACHE_DIR": "/a\x1b[31m",
            "OMP_NUM_THREADS": "2",
            "HF_TOKEN": "",
            "HOME": "/root",
        }
    )
    assert actual == {
        "HF_ENDPOINT": "https://mirror.example/x",
        "HF_SOMETHING_NEW": "(set, not shown)",
        "HF_TOKEN": "(empty)",
        "NANOVLLM_CACHE_DIR": "/a\\x1b[31m",
        "OMP_NUM_THREADS": "2",
    }


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://user:secret@[::1", "http://[::1"),
        ("user:secret@mirror.example/@x", "mirror.example/@x"),
        ("https://mirror.example/a@b", "https://mirror.example/a@b"),
    ],
)
def test_an_address_that_is_none_is_shown_without_its_password(given: str, shown: str) -> None:
    assert shown_variables({"HF_ENDPOINT": given}) == {"HF_ENDPOINT": shown}
