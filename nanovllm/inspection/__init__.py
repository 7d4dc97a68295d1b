"""Inspection: the intermediates of one prompt's forward pass, as data and as pictures.

The observing forward pass is the one in NumPy (model/families). The package takes a model folder
and uses neither the engine nor a running server.

In reading order:

observe         load a folder, encode a prompt, run the forward pass with an observer
attention       attention weights, and statistics of each head
logit_lens      the prediction of every layer
ablation        the loss and the predictions with parts switched off
embeddings      token embeddings in two dimensions, and nearest neighbours
trace           each operation with its shapes and statistics
memory          the memory of an inspection, and its limit
responses       these results as JSON, for the server's endpoints and the HTML files
worker          a process that computes responses for a server
worker_process  starts, limits and ends it
html_file       self-contained pages, whose scripts are in nanovllm/pages
pictures        .png and .svg, by matplotlib
"""
