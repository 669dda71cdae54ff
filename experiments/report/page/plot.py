"""The one Bokeh plot that the page draws again and again, as JSON; data, colours and ticks are given by its script."""

import json
import re
from typing import Any

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FixedTicker, Span
from bokeh.plotting import figure
from bokeh.resources import Resources

LINES = 8
"""As many as a view may have."""
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot", "solid", "dashed", "dotted")


def library() -> str:
    """BokehJS as a script element that asks no server for anything."""
    return str(Resources(mode="inline", components=["bokeh"]).render_js())


def plot() -> Any:
    """A plot of ``LINES`` lines with bands; what the script changes has a name."""
    columns: dict[str, list[float]] = {f"{part}{i}": [] for part in ("y", "low", "high") for i in range(LINES)}
    source = ColumnDataSource({"x": [], **columns}, name="source")
    drawn = figure(
        name="plot", height=320, sizing_mode="stretch_width", toolbar_location=None, tools="", x_range=(0, 1),
        y_range=(0, 1), background_fill_color=None, border_fill_color=None,
    )  # fmt: skip
    for i, dash in enumerate(DASHES):
        band = drawn.varea("x", f"low{i}", f"high{i}", source=source, fill_alpha=0.18)
        line = drawn.line("x", f"y{i}", source=source, line_width=2, line_dash=dash)
        band.glyph.name, line.glyph.name = f"band{i}", f"line{i}"
    drawn.add_layout(Span(name="here", dimension="height", location=0, line_width=1, line_dash="solid"))
    drawn.outline_line_color = None
    for name, axis in (("across", drawn.xaxis[0]), ("up", drawn.yaxis[0])):
        axis.name, axis.ticker = name, FixedTicker(ticks=[])
        axis.major_label_text_font_size = axis.axis_label_text_font_size = "12px"
        axis.axis_label_text_font_style = "normal"
    for name, grid in (("grid across", drawn.xgrid[0]), ("grid up", drawn.ygrid[0])):
        grid.name = name
    drawn.xgrid[0].visible = False
    return _renumbered(json_item(drawn))


def _renumbered(item: Any) -> Any:
    """The same with ids that do not depend on what was drawn before in this process."""
    text = json.dumps(item)
    found = dict.fromkeys(re.findall(r'"(p\d+)"', text))
    new = {old: f"p{i}" for i, old in enumerate(found)}
    return json.loads(re.sub(r'"(p\d+)"', lambda mark: f'"{new[mark[1]]}"', text))
