"""HTML pages in one file, and the scripts and style sheets that they share with the server's page.

page     a self-contained page: its policy, its text and its data
bundle   joins ES modules to one script
assets/  ES modules and style sheets: elements, charts, and the views of inspection and of training
"""

from nanovllm.pages.page import ASSETS, render_page

__all__ = ["ASSETS", "render_page"]
