"""The inspector: the web page at `/` that shows the engine at work, and the endpoints behind it.

- `page.py`: serves the page and its assets, which load nothing from other hosts.

`assets/` has the page, its style sheet and its scripts: ES modules without a build step.
"""
