"""build(args): the application that `serve run` starts.

    serve run examples/ray/two-replicas.yaml

A request goes from Ray Serve's proxy to the ingress, and from there to a replica of its model. A
replica is the unchanged server of `nanovllm serve`, with threads and a KV cache of its own.
"""

from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from nanovllm.deploy.check import check_models
from nanovllm.deploy.ingress import INGRESS, Ingress
from nanovllm.deploy.replica import EngineReplica
from nanovllm.deploy.settings import ModelSettings, Routing, read_settings
from nanovllm.model.machine import memory_limit

_ROUTERS: dict[Routing, str] = {
    "prefix": "nanovllm.deploy.ray_router.PrefixAwareRouter",
    "least-loaded": "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter",
    "round-robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
}
_HEALTH_PERIOD_S = 5.0
_INGRESS_MAX_ONGOING = 4096


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application of a config file's `args` (settings.py describes them).

    Raises ValueError or NanovllmError, before anything is started, for settings that are not
    valid, models that do not exist, and more replicas than the cluster has CPUs or memory for.
    """
    settings = read_settings(args)
    limit = None
    if ray.is_initialized():
        settings.check_cpus(ray.cluster_resources().get("CPU", 0.0))
        is_one_machine = len(ray.nodes()) == 1 and not settings.can_grow
        limit = memory_limit() if is_one_machine else None
    check_models(settings, limit)
    replicas = [
        _deployment(model, f"model-{index}").bind(model)
        for index, model in enumerate(settings.models)
    ]
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=_INGRESS_MAX_ONGOING,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        health_check_period_s=_HEALTH_PERIOD_S,
    )
    return ingress.bind(settings.models, *replicas)


def _deployment(model: ModelSettings, name: str) -> serve.Deployment:
    """Return the deployment of a model's replicas."""
    router = RequestRouterConfig(
        request_router_class=_ROUTERS[model.routing],
        request_router_kwargs={"max_extra_requests": model.max_extra_requests}
        if model.routing == "prefix"
        else {},
    )
    options: dict[str, Any] = {"num_replicas": model.replicas}
    if model.is_autoscaled:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=model.replicas,
                max_replicas=model.most_replicas,
                target_ongoing_requests=model.target_ongoing_requests,
                upscale_delay_s=model.upscale_delay_s,
                downscale_delay_s=model.downscale_delay_s,
                policy=AutoscalingPolicy(policy_function="nanovllm.deploy.scaling:scale"),
            )
        }
    return serve.deployment(
        EngineReplica,
        name=name,
        max_ongoing_requests=model.max_ongoing_requests,
        max_queued_requests=model.max_queued_requests,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=model.drain_timeout_s,
        health_check_period_s=_HEALTH_PERIOD_S,
        request_router_config=router,
        ray_actor_options={"num_cpus": model.cpus},
        **options,
    )
