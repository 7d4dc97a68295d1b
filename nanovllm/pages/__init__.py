"""HTML pages in one file, and the scripts and style sheets that they share with the server's page.

page     a self-contained page: its policy, its text and its data
bundle   joins ES modules to one script
assets/  ES modules and style sheets, in folders that import downward:
         inspector            the page of the server: tabs, theme, key, tour
         engine, playground, inspection, report    the views, and the scripts of files
         client               calls of the server, and what they return
         charts               charts and canvases
         elements             elements, components, numbers as text, the design's colours and sizes

The browser loads these files as they are; the server's addresses end with their paths.
"""

from nanovllm.pages.page import ASSETS, render_page

__all__ = ["ASSETS", "render_page"]
