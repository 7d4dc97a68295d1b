"""Vectors, storage formats, and the loads and stores of all kernels.

activation  activation functions and their slopes
move        records at an address, and copies of rows
elements    loops over arrays of any length: whole vectors, then single elements
scalar      scalars at an address, and float32 as ordered integers
tile        the innermost loop of every matmul
formats     float32, bfloat16 and int8 in panels, and how a tile multiplies by them
rows        rows of an array as one argument
kernel      functions of compiled code whose bodies are emitted through Vectors
vector      operations on vectors of float32 and int32, and loops
value       scalars and vectors with Python's operators
"""
