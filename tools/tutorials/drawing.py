"""Boxes, arrows and colours of the tutorials' diagrams."""

from nanovllm.cli.svg import text

STYLE = """
  rect { stroke-width: 1.2; }
  .box { fill: #f6f8fa; stroke: #8c959f; }
  .empty { fill: none; stroke: #d1d9e0; }
  .a { fill: #54aeff; stroke: #0969da; } .b { fill: #ffb77c; stroke: #bc4c00; }
  .c { fill: #7ee0a0; stroke: #1a7f37; } .d { fill: #d8b9ff; stroke: #8250df; }
  .cached { fill-opacity: 0.25; stroke-dasharray: 3 2; }
  text.small { font-size: 10.5px; }
  text.forward { fill: #0969da; font-variant-numeric: tabular-nums; }
  text.backward { fill: #bc4c00; font-variant-numeric: tabular-nums; }
  path.flow { stroke: #8c959f; stroke-width: 1.5; }
  path.head { fill: #8c959f; stroke: none; }
  path.one { stroke: #0969da; } path.two { stroke: #bc4c00; } path.three { stroke: #1a7f37; }
  path.four { stroke: #8250df; }
  path.dashed { stroke-dasharray: 5 3; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #21262d; stroke: #656d76; }
    .empty { stroke: #3d444d; }
    .a { fill: #1158c7; stroke: #4493f8; } .b { fill: #9b4215; stroke: #f0883e; }
    .c { fill: #196c2e; stroke: #3fb950; } .d { fill: #6639a6; stroke: #ab7df8; }
    text.forward { fill: #4493f8; } text.backward { fill: #f0883e; }
    path.flow { stroke: #656d76; } path.head { fill: #656d76; }
    path.one { stroke: #4493f8; } path.two { stroke: #f0883e; } path.three { stroke: #3fb950; }
    path.four { stroke: #ab7df8; }
  }
"""
_HEAD = 5  # pixels


def box(x: float, y: float, width: float, height: float, label: str = "", kind: str = "box") -> str:
    """Return a rounded box with a label in its middle."""
    rect = (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>'
    )
    return rect + (text(x + width / 2, y + height / 2 + 4, label, "", "middle") if label else "")


def arrow(*points: tuple[float, float]) -> str:
    """Return a line through the points, with a head at the last, which it reaches along an axis."""
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
    back = (x1 - _HEAD * dx, y1 - _HEAD * dy)
    path = "L".join(f"{x:g} {y:g}" for x, y in (*points[:-1], back))
    side = (_HEAD * 0.6 * dy, _HEAD * 0.6 * dx)
    corners = (
        f"{back[0] + side[0]:g} {back[1] + side[1]:g}L{back[0] - side[0]:g} {back[1] - side[1]:g}"
    )
    return f'<path class="flow" d="M{path}"/><path class="head" d="M{x1:g} {y1:g}L{corners}Z"/>'
