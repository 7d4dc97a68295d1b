"""The image: pinned packages, and the script that builds it with the builder that works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "build_image.sh"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_package_of_the_image_has_one_version(machine: str) -> None:
    """`make constraints` renews the versions after a change of pyproject.toml."""
    (python,) = re.findall(
        r"^ARG BASE=python:(3\.\d+)-slim$",
        (ROOT / "Dockerfile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    image = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_machine": machine, "platform_python_implementation": "CPython",
        "implementation_name": "cpython", "extra": "",
    }  # fmt: skip
    pinned: dict[str, str] = {}
    for line in (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            package = Requirement(line)
            if package.marker is None or package.marker.evaluate(image):
                assert package.name not in pinned, f"{package.name} has two versions"
                (specifier,) = package.specifier
                assert specifier.operator == "=="
                pinned[package.name] = specifier.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["ray"],
    ]
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate(image):
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: {version} is pinned"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    ("builders", "arguments", "expected"),
    [
        ("docker podman buildah", [], "docker build -t nanovllm ."),
        ("podman buildah", ["-t", "mine"], "podman build --format docker -t mine ."),
        ("buildah", ["--no-cache"], "buildah build --format docker -t nanovllm --no-cache ."),
        ("", [], None),
    ],
)
def test_the_builder_is_one_that_works(
    tmp_path: Path, builders: str, arguments: list[str], expected: str | None
) -> None:
    for name in ("docker", "podman", "buildah"):
        program = tmp_path / name
        answer = "true" if name in builders.split() else "false"
        program.write_text(
            f'#!/bin/sh\ncase "$1" in\nbuild) echo {name} "$@" ;;\n*) {answer} ;;\nesac\n',
            encoding="utf-8",
        )
        program.chmod(0o755)
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    environment = {key: value for key, value in os.environ.items() if key != "BUILDER"}
    done = subprocess.run(
        [SCRIPT, *arguments],
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if expected is None:
        assert done.returncode == 1
        assert "needs docker with a running server, podman or buildah" in done.stderr
    else:
        assert done.stdout == f"{expected}\n", done.stderr
