"""A figure as SVG inside of a page: text that is text, and the colors of the page, light or dark."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from .figures import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PINK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what a figure draws with -> the page's color for it; matplotlib writes lower case
COLORS = {
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    AMBER: "--amber",
    PINK: "--pink",
    GREY: "--grey",
    BLACK: "--ink",
    "#000000": "--ink",
    "#555555": "--soft",
    "#DDDDDD": "--line",
    "#CCCCCC": "--line",
}


def inline_svg(figure: Figure, description: str) -> str:
    """Return a figure as an element of HTML.

    Args:
        figure: drawn with the colors of `figures`.
        description: what it shows, for those who do not see it.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.S)
    for color, name in COLORS.items():
        svg = re.sub(color, f"var({name})", svg, flags=re.I)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    label = escape(description)
    opening = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
    opening += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"^<svg[^>]*>", opening, svg, count=1)
