"""From source to machine code, and the memory layouts that both sides of a call agree on.

target          the instruction set and data types that kernels are compiled for
peak            multiply-adds a second by instruction, and the choice for bfloat16
amx             whether linear layers use the CPU's tile unit
tile_twin       that unit in NumPy
codegen         the host CPU as LLVM names it, and loading of object files
compiler        decorators for compiled functions, and one object file for all entries
object_cache    a folder that keeps object files between processes
shipped         finds the shared objects of a wheel that has kernels
bounds          NANOVLLM_CHECK=1: checks every address that a kernel reads or writes
check_code      the code of such a check
layout          the memory that the threads of a run share
packing         padding, alignment and panels
"""
