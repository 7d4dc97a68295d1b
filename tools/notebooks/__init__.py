"""The notebooks of the course: each is a module here, in cells that begin with `# %%`.

Run `python -m tools.notebooks` to write nanovllm/learn/notebooks/*.ipynb from them.
"""
