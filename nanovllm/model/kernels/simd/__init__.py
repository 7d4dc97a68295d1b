"""Vectors, storage formats, and the loads and stores of all kernels.

vector   operations on vectors of float32 and int32
formats  float32, bfloat16 and int8 in panels, and how a tile multiplies by them
scalar   scalars at an address, and float32 as ordered integers
move     records at an address, and copies of rows
"""
