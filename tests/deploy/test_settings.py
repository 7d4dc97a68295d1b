"""The settings of a Ray Serve application are checked before anything starts."""

from typing import Any

import pytest

from nanovllm.cli.main import build_parser
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.deploy.settings import AppSettings, read_settings
from nanovllm.speculative_config import SpeculativeConfig


def read(**model: Any) -> AppSettings:
    return read_settings({"models": [{"model": "tiny-books", **model}]})


def test_options_are_those_of_nanovllm_serve() -> None:
    options = {
        "quantization": "int8", "log_requests": True, "allowed-hosts": ["a", "b"],
        "allowed-origins": "https://a", "max-body-bytes": 1000, "request-timeout-s": 2.5,
        "no-enable-prefix-caching": "true",
    }  # fmt: skip
    (model,) = read(name="books", num_threads=3, options=options).models
    line = (
        "serve tiny-books --num-threads 3 --no-inspector --no-response-store "
        "--served-model-name books --quantization int8 --log-requests --allowed-hosts a "
        "--allowed-hosts b --allowed-origins https://a --max-body-bytes 1000 "
        "--request-timeout-s 2.5 --no-enable-prefix-caching"
    )
    assert model.serve_options() == ServeOptions.of(build_parser().parse_args(line.split()))


def test_what_is_off_for_several_replicas_can_be_switched_on() -> None:
    (model,) = read(options={"inspector": True, "response_store": True}).models
    options = model.serve_options()
    assert (options.inspector, options.response_store) == (True, True)


def test_cpus_are_those_of_all_replicas_when_scaled_up() -> None:
    assert read(replicas=2, num_threads=4).cpus == 8
    assert read(replicas=2, max_replicas=5, num_threads=4, num_cpus=3.5).cpus == 17.5


def test_more_replicas_than_cpus_are_refused() -> None:
    settings = read(replicas=3, num_threads=2)
    settings.check_cpus(6)
    with pytest.raises(ValueError, match=r"need 6 CPUs \(tiny-books: 3 of 2\), but .* has 4"):
        settings.check_cpus(4)
    read_settings({"models": [{"model": "m", "replicas": 9}], "can_grow": True}).check_cpus(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replicas": 4, "max_replicas": 2}, r"max_replicas is 2, less than replicas \(4\)"),
        ({"routing": "random"}, "'prefix', 'least-loaded' or 'round-robin'"),
        ({"replicas": True}, "valid integer"),
        ({"name": ""}, "at least 1 character"),
        ({"drain_timeout_s": float("inf")}, "finite number"),
        ({"replica": 2}, "replica\n  Extra inputs are not permitted"),
        ({"options": {"api-key": "secret"}}, "use api-key-file, because Ray logs"),
        ({"options": {"port": 1}}, "options has port; set port in http_options"),
        ({"options": {"num-threads": 1}}, "options has num-threads; set num_threads of the model"),
        ({"options": {"quantisation": "int8"}}, r"--quantisation; did you mean --quantization\?"),
        ({"options": {"quantization": "int3"}}, "option of tiny-books is not valid: .* be int8"),
        ({"options": {"max-body-bytes": -1}}, "--max-body-bytes: -1 must be an integer"),
        ({"options": {"log-requests": "perhaps"}}, "'perhaps' must be true or false"),
        ({"options": {"backend": ["numpy"]}}, "--backend: takes one value, not a list"),
        ({"options": {"backend": {"a": 1}}}, "--backend: takes one value, not a mapping"),
        (
            {"options": {"speculative-config": {"num_speculative_tokens": 0}}},
            "num_speculative_tokens is 0 but must be an integer, from 1 to 32",
        ),
        ({"options": {"help": True}}, "unrecognized option --help"),
    ],
)
def test_wrong_settings_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**model)


def test_an_option_in_json_is_a_mapping() -> None:
    (model,) = read(options={"speculative-config": {"prompt_lookup_max": 3}}).models
    assert model.serve_options().engine.speculation == SpeculativeConfig(prompt_lookup_max=3)


def test_an_error_does_not_show_the_options() -> None:
    with pytest.raises(ValueError, match="options has model") as caught:
        read(options={"port": 1, "model": "secret"})
    assert "secret" not in str(caught.value)


def test_an_application_has_a_model() -> None:
    with pytest.raises(ValueError, match="models"):
        read_settings({"models": []})
