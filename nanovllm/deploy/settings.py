"""The `args` of a Ray Serve config file: which models to serve, on how many replicas.

Args:
      models:
        - model: tiny-books
          replicas: 2
          num_threads: 1
          options: {quantization: int8}

Everything is checked before a replica starts.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanovllm.cli.serve import options_from
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.deploy.prefix_policy import MAX_EXTRA_REQUESTS

Option = str | int | float | bool
Routing = Literal["prefix", "least-loaded", "round-robin"]


class _Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # options may have an API key
        use_attribute_docstrings=True,
    )


class ModelSettings(_Settings):
    """One model and its replicas."""

    model: str
    """folder, or name such as gpt2, as of `nanovllm serve`"""
    name: str | None = Field(None, min_length=1)
    """name in requests; default: the folder's name"""
    replicas: int = Field(1, ge=1, le=1024)
    """replicas, or the minimum with autoscaling"""
    max_replicas: int | None = Field(None, ge=1, le=1024)
    """maximum replicas; more than `replicas` enables autoscaling; default: replicas"""
    num_threads: int = Field(1, ge=1, le=1024)
    """compute threads of a replica"""
    num_cpus: float | None = Field(None, gt=0, le=1024)
    """CPUs that Ray reserves for a replica; default: num_threads"""
    routing: Routing = "prefix"
    """how a replica is chosen"""
    max_extra_requests: float = Field(MAX_EXTRA_REQUESTS, ge=0)
    """requests by which a replica with the cached prefix may exceed the least busy one"""
    target_ongoing_requests: float = Field(16, gt=0)
    """unfinished requests of a replica that autoscaling aims at"""
    max_ongoing_requests: int = Field(64, ge=1)
    """unfinished requests of a replica"""
    max_queued_requests: int = Field(128, ge=0)
    """requests that wait for a replica; one more gets a 429"""
    stream_interval_s: float = Field(0.05, ge=0, le=10)
    """minimum seconds between chunks of a stream after the first two; each chunk costs Ray 1 ms"""
    upscale_delay_s: float = Field(10, ge=0)
    """seconds for which more replicas are needed before one is added"""
    downscale_delay_s: float = Field(300, ge=0)
    """seconds for which fewer replicas are needed before one is removed"""
    drain_timeout_s: float = Field(60, ge=0)
    """seconds for a replica's requests to end before it is stopped"""
    options: dict[str, Option | list[Option] | dict[str, Option]] = Field(default_factory=dict)
    """other options of `nanovllm serve`, without their dashes; a list repeats one"""

    @model_validator(mode="after")
    def _check_replicas(self) -> "ModelSettings":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, less than replicas ({self.replicas}); "
                "raise the first or lower the second"
            )
        for name in sorted(self.options):
            if remedy := _TAKEN_OPTIONS.get(name.replace("-", "_")):
                raise ValueError(f"options has {name}; {remedy}")
        self.serve_options()
        return self

    @property
    def cpus(self) -> float:
        """CPUs that each replica reserves."""
        return float(self.num_threads) if self.num_cpus is None else self.num_cpus

    @property
    def most_replicas(self) -> int:
        """Number of replicas when scaled up."""
        return self.max_replicas or self.replicas

    @property
    def is_autoscaled(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.most_replicas > self.replicas

    def serve_options(self) -> ServeOptions:
        """Return the options of `nanovllm serve` for a replica; raises ValueError."""
        own = {"model": self.model, "num_threads": self.num_threads}
        names = {} if self.name is None else {"served_model_name": self.name}
        try:
            return options_from({**_DEFAULTS, **self.options, **own, **names})
        except ValueError as error:
            raise ValueError(f"an option of {self.model} is not valid: {error}") from None


_DEFAULTS = {
    "inspector": False,  # each request would show another replica
    "response_store": False,  # the next request may go to another replica
}
_TAKEN_OPTIONS = {
    "model": "name it by `model`",
    "num_threads": "set num_threads of the model itself",
    "served_model_name": "set `name` of the model itself",
    "api_key": "use api-key-file, because Ray logs the configuration",
    "host": "set host in http_options of the config file",
    "port": "set port in http_options of the config file",
    "ssl_certfile": "set ssl_certfile in http_options of the config file",
    "ssl_keyfile": "set ssl_keyfile in http_options of the config file",
    "shutdown_timeout_s": "set drain_timeout_s of the model itself",
    "drain_delay_s": "leave it out, Ray stops sending requests to a replica before it ends it",
}
"""Options that are set elsewhere, and where."""


class AppSettings(_Settings):
    """An application: several models behind one ingress."""

    models: list[ModelSettings] = Field(min_length=1, max_length=64)
    """settings of each model, as above"""
    ingress_replicas: int = Field(1, ge=1, le=64)
    """processes that take HTTP requests"""
    ingress_cpus: float = Field(0.0, ge=0, le=64)
    """CPUs that Ray reserves for each of them"""
    can_grow: bool = False
    """the cluster adds machines on demand; do not check its CPUs"""

    @property
    def cpus(self) -> float:
        """CPUs that the application needs when it is scaled up."""
        models = sum(model.most_replicas * model.cpus for model in self.models)
        return models + self.ingress_replicas * self.ingress_cpus

    def check_cpus(self, available: float) -> None:
        """Raise ValueError if the cluster has too few CPUs for all replicas."""
        if not self.can_grow and self.cpus > available:
            parts = ", ".join(
                f"{model.model}: {model.most_replicas} of {model.cpus:g}" for model in self.models
            )
            raise ValueError(
                f"the replicas need {self.cpus:g} CPUs ({parts}), but the cluster has "
                f"{available:g}; lower replicas or num_threads, add machines, or set can_grow "
                "if machines are added on demand"
            )


def read_settings(args: Mapping[str, Any]) -> AppSettings:
    """Return the settings of a config file's `args`; raises ValueError naming the field."""
    return AppSettings.model_validate(args)
