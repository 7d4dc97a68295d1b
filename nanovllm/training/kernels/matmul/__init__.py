"""C = A @ B, A @ B^T and A^T @ B.

Each line imports only from lines below it:

matmul    the loops over blocks, divided into items for the threads
epilogue  the end of a matmul: sums of parts, bias and activation
pack      operands in the order in which tiles read them
tile      tiles that may begin and end with other arrays
"""
