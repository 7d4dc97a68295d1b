"""Charts as SVG, whose colours follow the reader's light or dark theme."""

from collections.abc import Sequence
from html import escape

_STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 12px; }
  text { fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; }
  .note { fill: #59636e; font-variant-numeric: tabular-nums; }
  .bar { fill: #afb8c1; }
  .bar.ours { fill: #0969da; }
  .strong { font-weight: 600; }
  .value { font-variant-numeric: tabular-nums; }
  line { stroke: #d1d9e0; }
  path { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: #bc4c00; }
  path.ours { stroke: #0969da; }
  .training { stroke-width: 1.2; stroke-dasharray: 5 3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .note { fill: #9198a1; }
    .bar { fill: #59636e; }
    .bar.ours { fill: #4493f8; }
    line { stroke: #3d444d; }
    path { stroke: #db6d28; }
    path.ours { stroke: #4493f8; }
  }
"""


def picture(title: str, width: int, height: int, parts: Sequence[str], style: str = "") -> str:
    """Return a picture of these elements below its title; `style` is added to the common one."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n"
        f"{text(16, 28, title, 'title')}\n"
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """Return a text; `kind` is its class: title, strong, value or note."""
    return (
        f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'
    )
