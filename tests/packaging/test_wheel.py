"""The archives contain the right files, and wheels work in an empty environment.

There they generate with and serve the bundled model, in a folder outside of the repository: one as
built, and one with kernels and without Numba.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pytest

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.model.kernels.build.object_cache import user_cache
from nanovllm.model.kernels.build.target import Spec, host_target
from nanovllm.model.kernels.library import load_library
from tests.support.wheels import install, metadata_of, post, run, served_model, serving

ROOT = Path(__file__).parents[2]
PACKAGES = {"cli", "server", "engine", "runner", "model", "bundled"}
MODEL_FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
STOP_TIMEOUT_S = 30.0

pytestmark = pytest.mark.network


@pytest.fixture(scope="module", autouse=True)
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip if the package index cannot be reached; with CI set, a later step fails instead."""
    if os.environ.get("CI"):
        return
    options = ["--quiet", "--no-deps", "--retries", "0", "--timeout", "20"]
    target = ("--dest", str(tmp_path_factory.mktemp("index")), "hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, *target],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        pytest.skip(f"the package index cannot be reached: {' '.join(done.stderr.split())[-200:]}")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [path] = dist.glob("*.whl")
    return path


def level_of_this_cpu() -> str | None:
    """Return the level of a wheel with kernels that fits; None where the test cannot build it."""
    target = host_target()
    if not target.is_x86 or target.lanes < 8 or sys.platform != "linux" or not shutil.which("cc"):
        return None
    return {8: "avx2", 16: "zen5" if target.nontemporal else "avx512"}[target.lanes]


LEVEL = level_of_this_cpu()


@pytest.fixture(scope="module")
def kernel_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with kernels for this CPU in float32."""
    if LEVEL is None:
        pytest.skip("needs Linux on an x86 CPU with AVX2, and a linker")
    folder = tmp_path_factory.mktemp("kernel-wheel")
    types = ("--levels", LEVEL, "--weights", "float32", "--caches", "float32")
    script = ROOT / "scripts/kernel_wheel.py"
    run(sys.executable, script, "--wheel", wheel, *types, "--dest", folder, cwd=ROOT)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of a new environment with the wheel."""
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def small_environment(kernel_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the wheel that has kernels."""
    return install(kernel_wheel, tmp_path_factory.mktemp("small-environment"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder whose own `model.py` and `server.py` must not get in the way."""
    for name in ("model.py", "server.py", "runner.py"):
        (tmp_path / name).write_text("raise ImportError('this is the user\\'s own file')\n")
    return tmp_path


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this user's compiled kernels, which fit the wheel where its Numba is the same."""
    load_library(Spec(host_target()))
    folder = tmp_path_factory.mktemp("machine-code")
    with suppress(FileNotFoundError):  # nothing could be kept
        shutil.copytree(user_cache().folder, folder / "kernels")
    return folder


@pytest.fixture
def new_env(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`env` of a machine that has compiled nothing yet."""
    return {**env, "NANOVLLM_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def env(tmp_path_factory: pytest.TempPathFactory, machine_code: Path) -> dict[str, str]:
    """Without the repository on the path and without a hub: the bundled model needs neither."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} and not name.startswith("HF_")
    }
    return {
        **kept,
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_HUB_OFFLINE": "1",
        "NANOVLLM_CACHE_DIR": str(machine_code),
    }


def entries_of(names: list[str], package: str) -> set[str]:
    return {
        PurePosixPath(name).relative_to(package).parts[0]
        for name in names
        if PurePosixPath(name).is_relative_to(package)
    }


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"nanovllm-{nanovllm.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"nanovllm", info}
    assert entries_of(names, "nanovllm") >= {*PACKAGES, "py.typed", "__init__.py", "llm.py"}
    assert {f"nanovllm/bundled/tiny-books/{name}" for name in MODEL_FILES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assets = ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "LICENSE-swagger-ui.txt")
    assert {f"nanovllm/server/http/docs_assets/{name}" for name in assets} <= set(names)
    pages = [path for path in (ROOT / "nanovllm/pages/assets").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in pages} <= set(names)
    assert not [name for name in names if "tests" in name or "__pycache__" in name]


def test_wheel_is_a_small_download(wheel: Path) -> None:
    assert wheel.stat().st_size < 8e6


def test_wheel_says_what_it_is(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(
            f"nanovllm-{nanovllm.__version__}.dist-info/entry_points.txt"
        ).decode()
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == (
        "nanovllm",
        nanovllm.__version__,
        ">=3.10",
    )
    assert metadata["License-Expression"] == "MIT"
    assert "nanovllm = nanovllm.cli.main:main" in entry_points
    needed = {
        re.split(r"[^A-Za-z0-9-]", line)[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert not needed & {"torch", "transformers", "pytest", "ruff", "mypy"}


def test_source_archive_holds_each_file_once(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = [member.name for member in members]
    top = f"nanovllm-{nanovllm.__version__}"
    assert entries_of(names, f"{top}/nanovllm") >= {*PACKAGES, "py.typed"}
    assert {
        f"{top}/{name}"
        for name in ("tests/conftest.py", "Makefile", "LICENSE", "README.md", "pyproject.toml")
    } <= set(names)
    assert not entries_of(names, top) & {"runner", "model", "server", "learn", ".venv", "models"}
    weights = [name for name in names if name.endswith("/model.safetensors")]
    models = ("tiny-books-draft", "tiny-books")  # in the order of the paths
    assert sorted(weights) == [f"{top}/nanovllm/bundled/{m}/model.safetensors" for m in models]


def test_source_archive_holds_all_that_is_tracked(dist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is an unpacked source archive")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    links = {"runner", "model", "server", "learn"}
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = entries_of(archive.getnames(), f"nanovllm-{nanovllm.__version__}")
    assert packed - {"PKG-INFO"} == {PurePosixPath(name).parts[0] for name in tracked} - links


def test_tests_of_the_source_archive_run(dist: Path, tmp_path: Path) -> None:
    """Those that read files of the repository, with the packages of this environment."""
    [path] = dist.glob("*.tar.gz")
    shutil.unpack_archive(path, tmp_path)
    folder = tmp_path / f"nanovllm-{nanovllm.__version__}"
    readers = ("deploy/test_image.py", "deploy/test_manifests.py", "docs/test_pages.py")
    run(
        sys.executable,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"tests/{name}" for name in readers),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def test_library_works_from_another_folder(
    environment: Path, elsewhere: Path, env: dict[str, str]
) -> None:
    program = (
        "import nanovllm; from nanovllm import EngineConfig, LLM, SamplingParams;"
        "assert callable(LLM); assert SamplingParams(n=2).n == 2; EngineConfig();"
        "print(nanovllm.__version__, nanovllm.__file__)"
    )
    version, file = run(environment / "python", "-c", program, cwd=elsewhere, env=env).split(
        maxsplit=1
    )
    assert version == nanovllm.__version__
    assert Path(file).is_relative_to(environment.parent)


def test_kernels_can_be_compiled(environment: Path, elsewhere: Path, env: dict[str, str]) -> None:
    """With what the wheel has and depends on; what is compiled here is a small part of them."""
    program = (
        "from nanovllm.model.kernels import entries;"
        "from nanovllm.model.kernels.build import codegen;"
        "from nanovllm.model.kernels.threads import worker;"
        "from nanovllm.model.kernels.build.compiler import ARGUMENTS, emit_object;"
        "worker.run_job.compile(ARGUMENTS);"
        "print(len(emit_object({'run_job': worker.run_job}, codegen.host_cpu())))"
    )
    assert int(run(environment / "python", "-c", program, cwd=elsewhere, env=env)) > 0


def test_generate_prints_text(environment: Path, elsewhere: Path, env: dict[str, str]) -> None:
    text = run(
        environment / "nanovllm",
        "generate",
        "Once upon a time",
        "--max-tokens",
        "8",
        "--temperature",
        "0",
        cwd=elsewhere,
        env=env,
    )
    assert len(text.replace("Once upon a time", "").split()) >= 3


def test_a_wheel_with_kernels_says_what_it_needs(kernel_wheel: Path) -> None:
    assert re.search(r"-py3-none-manylinux_2_\d+_x86_64\.whl$", kernel_wheel.name)
    metadata = metadata_of(kernel_wheel)
    [numba] = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith("numba")]
    assert re.search(r"^numba[<>=.,0-9]+; extra == 'compile'$", numba)
    assert "compile" in metadata.get_all("Provides-Extra", [])
    assert kernel_wheel.stat().st_size < 12e6


_TRAIN = """
import sys
from nanovllm import LLM, SamplingParams, TrainableModel
from nanovllm.model.kernels.build.shipped import FOLDER
llm = LLM(dtype="float32", kv_cache_memory="4MiB")
greedy = SamplingParams(temperature=0, max_tokens=8)
print(llm.generate("Once upon a time", greedy, use_tqdm=False)[0].outputs[0].token_ids)
model = TrainableModel.load("tiny-books")
print(len(list(FOLDER.glob("*.so"))), *sorted({"numba", "llvmlite"} & {*sys.modules}))
"""


def test_a_wheel_with_kernels_starts_without_numba(
    small_environment: Path, elsewhere: Path, new_env: dict[str, str]
) -> None:
    lines = run(small_environment / "python", "-c", _TRAIN, cwd=elsewhere, env=new_env).split("\n")
    expected = LLM(backend="numpy", kv_cache_memory="4MiB").generate(
        "Once upon a time", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
    )
    assert lines[0] == str(expected[0].outputs[0].token_ids)
    assert int(lines[1]) >= 4, "shared objects, and neither Numba nor LLVM"


def test_what_has_no_kernels_is_an_error_with_a_remedy(
    small_environment: Path, elsewhere: Path, new_env: dict[str, str]
) -> None:
    for arguments, env in (
        (("--quantization", "int8"), new_env),
        ((), {**new_env, "NANOVLLM_KERNELS": "compile"}),
        ((), {**new_env, "NUMBA_CPU_NAME": "haswell"}),
    ):
        done = subprocess.run(
            [small_environment / "nanovllm", "generate", "Once", "--max-tokens", "2", *arguments],
            cwd=elsewhere, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert re.search(r"pip install 'numba<[0-9.]+,>=[0-9.]+'", done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_server_answers_and_stops(
    request: pytest.FixtureRequest, elsewhere: Path, env: dict[str, str]
) -> None:
    environment = request.getfixturevalue("small_environment" if LEVEL else "environment")
    with serving(environment, elsewhere, env) as (server, url):
        answer = post(
            f"{url}/v1/completions",
            {
                "model": served_model(url),
                "prompt": "Once upon a time",
                "max_tokens": 8,
                "temperature": 0,
            },
        )
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"].strip()
        assert answer["usage"]["completion_tokens"] == 8
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_TIMEOUT_S) == 0
