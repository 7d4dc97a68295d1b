"""Processors that kernels can be compiled for and run on here: this one, and lesser ones that it understands."""

from dataclasses import replace

from nanovllm.model.kernels.target import Target, host_target

HOST = host_target()
_PLAIN = replace(HOST, bfloat16_dot=False, int8_dot=False)
_NARROWER = [replace(_PLAIN, lanes=lanes) for lanes in (16, 8, 4) if lanes <= HOST.lanes]

TARGETS = list(dict.fromkeys([HOST, *_NARROWER, Target(lanes=4)]))
"""This processor, then every vector width that it has without its dot products, then what no processor in particular has."""

WHOLE_TARGETS = list(
    dict.fromkeys(
        [HOST, next(target for target in TARGETS[1:] if target.lanes <= 8), Target(lanes=4)]
    )
)
"""Fewer of them, for what takes long to compile: this processor, one without AVX-512, and none in particular."""
