"""Vectors, storage formats, and the loads and stores of all kernels.

memory      scalars and records at an address, copies of rows, float32 as ordered integers
activation  activation functions and their slopes
elements    loops over arrays of any length: whole vectors, then single elements
tile        the innermost loop of every matmul
tile_unit   the instructions of the CPU's tile unit (Intel AMX), or their emulation
formats     float32, bfloat16 and int8 in panels, and how a tile multiplies by them
rows        rows of an array as one argument
kernel      functions of compiled code whose bodies are emitted through Vectors
vector      operations on vectors of float32 and int32, and loops
value       scalars and vectors with Python's operators
"""
