"""The container and Kubernetes files: valid by the API's schemas, and in step with the code."""

import importlib
import json
import re
import shlex
import shutil
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
from nanovllm.deploy.proxy import CALLBACK_VARIABLE
from nanovllm.deploy.settings import read_settings

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kubernetes" / "base"
RAY = ROOT / "deploy" / "kubernetes" / "ray" / "rayservice.yaml"
MONITORING = ROOT / "deploy" / "kubernetes" / "monitoring"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
VERSION = "1.31"
CALLBACK = "nanovllm.deploy.proxy:middlewares"
EXAMPLES = sorted((ROOT / "examples" / "ray").glob("*.yaml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def manifests() -> list[Path]:
    return [BASE / name for name in load(BASE / "kustomization.yaml")["resources"]]


def ray_groups() -> list[Any]:
    cluster = load(RAY)["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_of_the_server() -> Any:
    return load(BASE / "deployment.yaml")["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "path", [*manifests(), RAY.with_name("network.yaml")], ids=lambda path: path.stem
)
def test_a_manifest_is_valid(path: Path) -> None:
    kubernetes_validate.validate(load(path), VERSION, strict=True)


def test_every_manifest_is_listed() -> None:
    assert {*manifests(), BASE / "kustomization.yaml"} == set(BASE.glob("*.yaml"))
    listed = load(MONITORING / "kustomization.yaml")["resources"]
    others = {"kustomization.yaml", "prometheus-adapter.yaml"}
    assert {*listed, *others} == {path.name for path in MONITORING.glob("*.yaml")}


def test_a_wrong_manifest_is_refused() -> None:
    manifest = load(BASE / "deployment.yaml")
    manifest["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_server_of_the_deployment_parses_its_arguments() -> None:
    pod = pod_of_the_server()
    (container,) = pod["containers"]
    parsed = build_parser().parse_args(container["args"])
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert str(parsed.num_threads) == resources["limits"]["cpu"]
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > parsed.shutdown_timeout_s + pause_s


def test_the_pods_of_ray_are_valid() -> None:
    for group in ray_groups():
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {"name": "ray", **pod["metadata"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)


def test_only_the_head_of_ray_may_ask_kubernetes() -> None:
    cluster = load(RAY)["spec"]["rayClusterConfig"]
    head, *workers = [
        group["template"]["spec"]["automountServiceAccountToken"] for group in ray_groups()
    ]
    assert head is cluster["enableInTreeAutoscaling"]  # its autoscaler creates the workers
    assert not any(workers)
    assert pod_of_the_server()["automountServiceAccountToken"] is False


def test_no_container_has_more_rights_than_it_needs() -> None:
    pods = [pod_of_the_server(), *(group["template"]["spec"] for group in ray_groups())]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    contexts = [container["securityContext"] for pod in pods for container in pod["containers"]]
    contexts.append(load(RAY)["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"])
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_routes_of_rays_proxy_are_closed() -> None:
    module, _, name = CALLBACK.partition(":")
    assert hasattr(importlib.import_module(module), name)
    for group in ray_groups():
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": CALLBACK_VARIABLE, "value": CALLBACK} in container["env"]


def test_applying_a_manifest_does_not_reset_an_autoscaler() -> None:
    assert "replicas" not in load(BASE / "deployment.yaml")["spec"]
    assert not any("replicas" in group for group in ray_groups())


def test_the_autoscaler_counts_running_and_waiting_requests_and_scales_down_slowly() -> None:
    spec = load(BASE / "autoscaler.yaml")["spec"]
    (rule,) = load(MONITORING / "prometheus-adapter.yaml")["rules"]["custom"]
    assert spec["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    assert set(re.findall(r"nanovllm:(\w+)", rule["metricsQuery"])) == {
        "num_requests_running", "num_requests_waiting",
    }  # fmt: skip
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 300 > up["stabilizationWindowSeconds"]
    (policy,) = down["policies"]
    assert policy["type"] == "Pods"


@pytest.mark.parametrize("name", ["podmonitor", "podmonitor-ray"])
def test_the_metrics_are_scraped_where_they_are(name: str) -> None:
    spec = load(MONITORING / f"{name}.yaml")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    selected = spec["selector"]["matchLabels"]
    if name == "podmonitor":
        pod = pod_of_the_server()
        (group,) = load(BASE / "kustomization.yaml")["labels"]
        labels = group["pairs"]
    else:
        template = ray_groups()[0]["template"]
        pod, labels = template["spec"], template["metadata"]["labels"]
        labels = {**labels, "ray.io/node-type": "head"}  # added by KubeRay
    assert selected.items() <= labels.items()
    ports = {port["name"] for container in pod["containers"] for port in container["ports"]}
    assert endpoint["port"] in ports
    secrets = {
        variable["valueFrom"]["secretKeyRef"]["name"]
        for container in pod["containers"]
        for variable in container["env"]
        if "valueFrom" in variable
    }
    assert endpoint["authorization"]["credentials"]["name"] in secrets


def test_the_alerts_are_the_same_for_both_ways_to_load_them() -> None:
    assert load(MONITORING / "alerts.yaml")["spec"] == load(ALERTS)
    for group in load(ALERTS)["groups"]:
        for rule in group["rules"]:
            assert {"alert", "expr", "labels", "annotations"} <= rule.keys()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool of Prometheus")
def test_the_alerts_fire_when_they_should() -> None:
    tests = ALERTS.with_name("alerts-test.yaml")
    for command in (["check", "rules", str(ALERTS)], ["test", "rules", str(tests)]):
        done = subprocess.run(["promtool", *command], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [RAY, *EXAMPLES], ids=lambda path: path.stem)
def test_the_applications_of_ray_have_valid_settings(path: Path) -> None:
    content = load(path)
    if path == RAY:
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    for application in content["applications"]:
        assert application["import_path"] == "nanovllm.deploy.ray_serve:build"
        for model in read_settings(application["args"]).models:
            model.serve_options()


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
    pod = pod_of_the_server()
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
