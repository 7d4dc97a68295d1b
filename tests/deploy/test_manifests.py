"""The container and Kubernetes files: valid by the API's schemas, and in step with the code."""

import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from nanovllm.cli.main import build_parser
from nanovllm.deploy.settings import read_settings

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kubernetes" / "base"
RAY = ROOT / "deploy" / "kubernetes" / "ray" / "rayservice.yaml"
VERSION = "1.31"
EXAMPLES = sorted((ROOT / "examples" / "ray").glob("*.yaml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def manifests() -> list[Path]:
    return [BASE / name for name in load(BASE / "kustomization.yaml")["resources"]]


@pytest.mark.parametrize("path", manifests(), ids=lambda path: path.stem)
def test_a_manifest_is_valid(path: Path) -> None:
    kubernetes_validate.validate(load(path), VERSION, strict=True)


def test_every_manifest_is_listed() -> None:
    assert {*manifests(), BASE / "kustomization.yaml"} == set(BASE.glob("*.yaml"))


def test_a_wrong_manifest_is_refused() -> None:
    manifest = load(BASE / "deployment.yaml")
    manifest["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_server_of_the_deployment_parses_its_arguments() -> None:
    (container,) = load(BASE / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    parsed = build_parser().parse_args(container["args"])
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert str(parsed.num_threads) == resources["limits"]["cpu"]
    pod = load(BASE / "deployment.yaml")["spec"]["template"]["spec"]
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > parsed.shutdown_timeout_s + pause_s


def test_the_pods_of_ray_are_valid() -> None:
    cluster = load(RAY)["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("path", [RAY, *EXAMPLES], ids=lambda path: path.stem)
def test_the_applications_of_ray_have_valid_settings(path: Path) -> None:
    content = load(path)
    if path == RAY:
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    for application in content["applications"]:
        assert application["import_path"] == "nanovllm.deploy.ray_serve:build"
        for model in read_settings(application["args"]).models:
            build_parser().parse_args(model.arguments())


def test_compose_mounts_files_that_exist() -> None:
    services = load(ROOT / "compose.yaml")["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists()
    build_parser().parse_args(["serve", "tiny-books", *services["nanovllm"]["command"][2:]])
    scraped = load(ROOT / "deploy" / "compose" / "prometheus.yaml")["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["nanovllm:8000"]


def test_the_image_has_what_it_is_built_from() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    context = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"!{source}\n" in context
    for command in re.findall(r"nanovllm (generate .+) > /dev/null", text):
        build_parser().parse_args(shlex.split(command))
    user = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    pod = load(BASE / "deployment.yaml")["spec"]["template"]["spec"]
    assert set(user) == {str(pod["securityContext"]["runAsUser"])}


def test_the_kernels_of_the_image_belong_to_the_user_of_the_server() -> None:
    stage = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition(" AS built-in\n")[2]
    assert 0 <= stage.index("USER 10001:10001\n") < stage.index("nanovllm generate")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_of_the_image(status: int, code: int) -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (line,) = re.findall(r"HEALTHCHECK .*\n +CMD (.+)", text)

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.handle_request).start()
        arguments = [part.replace("8000", str(server.server_port)) for part in json.loads(line)]
        done = subprocess.run([sys.executable, *arguments[1:]], check=False, timeout=60)
    assert done.returncode == code
