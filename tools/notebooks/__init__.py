"""The notebooks of the course: each is a module here, in cells that begin with `# %%`.

`python -m tools.notebooks` writes nanovllm/learn/notebooks/*.ipynb from them, with outputs. The
first cell of code of each is `_install.py`.
"""
