"""Processors that kernels can be compiled for and run on here: this one, and lesser ones that it understands."""

from dataclasses import replace

from nanovllm.model.kernels.target import Target, host_target

HOST = host_target()
_PLAIN = replace(HOST, bfloat16_dot=False, int8_dot=False)
_NARROWER = [replace(_PLAIN, lanes=lanes) for lanes in (16, 8, 4) if lanes <= HOST.lanes]

TARGETS = list(dict.fromkeys([HOST, *_NARROWER, Target(lanes=4)]))
"""This processor, then every vector width that it has without its dot products, then what no processor in particular has."""
