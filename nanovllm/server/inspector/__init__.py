"""The inspector: the web page at `/` that shows the engine at work, and the endpoints behind it.

- `page.py`: serves the page and its assets, which load nothing from other hosts.
- `inspect_routes.py`: /v1/inspect/*, attention, logit lens and embeddings.
- `same_origin.py`: refuses requests that pages of other origins send.

`assets/` has the page and its scripts: ES modules without a build step. The style sheet, the
elements and the views that self-contained files show too are in `nanovllm/inspection/assets/`.
"""
