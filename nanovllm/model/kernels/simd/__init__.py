"""Vectors, storage formats, and the loads and stores of all kernels.

vector   vectors of float32 and int32: the operations that the kernels are written in
formats  float32, bfloat16 and int8 in panels, and how a tile multiplies by them
scalar   single numbers at an address
move     fields of records, and copies of rows
"""
