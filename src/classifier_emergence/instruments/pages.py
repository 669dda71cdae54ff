"""Readings as HTML files that need nothing else: no network, no server."""

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from classifier_emergence.extras import missing_extras_named
from classifier_emergence.instruments.drawing import FLOOR, rendered
from classifier_emergence.results import script_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;margin:1rem}svg{max-width:100%;height:auto;"
    "background:#fff}.scroll{overflow:auto}table{border-collapse:collapse;font-size:13px}"
    "th,td{padding:.1rem .5rem;border-bottom:1px solid #8886;text-align:left;unicode-bidi:isolate}"
)

_GREY = "#7d7d7d"
"""Can be read on white and on black, as can these of Okabe and Ito (2008), which colour-blind people tell apart."""
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")


def figure_page(figure: "Figure", rows: Sequence[dict[str, Any]], title: str) -> str:
    """A figure, and the numbers behind it as a table."""
    svg = rendered(figure, "svg").decode()
    lines = ["".join(f"<td>{escape(_cell(value))}</td>" for value in row.values()) for row in rows]
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in rows[0])
    title = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<h1>{title}</h1><figure role="img" aria-label="{title}; its numbers are in the table below">'
        f'{svg[svg.index("<svg") :]}</figure><div class="scroll" tabindex="0"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table></div></body></html>\n"
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def framed(page: str) -> str:
    """A page as part of another, such as a notebook; styles and scripts of the two do not meet."""
    return f'<iframe srcdoc="{escape(page)}" title="reading" style="width:100%;height:720px;border:0"></iframe>'


def map_page(data: dict[str, Any]) -> str:
    """A map as a grid to walk in, and with Bokeh what every layer says at the chosen token.

    Args:
        data: What ``lens_map.html`` reads: see ``lens_map.page_of``.
    """
    with missing_extras_named():
        from bokeh.resources import Resources

    page = resources.files(__package__).joinpath("lens_map.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": escape(f"{data['maps'][0]['model']}: the logit lens"),
        "LIBRARY": Resources(mode="inline", components=["bokeh"]).render_js(),
        "DATA": script_json(data),
        "FIGURE": script_json(_curves(data["layers"], data["targets"])),
    }
    # In one pass: what is put in may hold such marks itself.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)


def short_numbers(values: Any) -> Any:
    """Three significant digits: what a page shows."""
    return [short_numbers(value) for value in values] if isinstance(values, list) else float(f"{values:.3g}")


def _curves(layers: Sequence[str], targets: Sequence[str]) -> Any:
    with missing_extras_named():
        from bokeh.embed import json_item
        from bokeh.models import ColumnDataSource, HoverTool
        from bokeh.plotting import figure

    names = ["x", "layer", "token", "top", *(f"t{i}" for i in range(len(targets)))]
    source = ColumnDataSource({name: [] for name in names}, name="over layers")
    plot = figure(
        height=250, sizing_mode="stretch_width", y_axis_type="log", y_range=(FLOOR, 2), toolbar_location=None,
        x_range=(-0.5, len(layers) - 0.5), background_fill_color=None, border_fill_color=None, tools="",
        title="Over layers at the chosen token",
    )  # fmt: skip
    plot.title.text_color = _GREY
    plot.add_tools(HoverTool(tooltips=[("layer", "@layer"), ("top token", "@token"), ("its probability", "@top")]))
    step = max(1, round(len(layers) / 10))
    plot.xaxis.ticker = list(range(0, len(layers), step))
    plot.xaxis.major_label_overrides = dict(enumerate(layers))
    for axis in (plot.xaxis[0], plot.yaxis[0]):
        for part in ("major_label_text", "axis_label_text", "axis_line", "major_tick_line", "minor_tick_line"):
            setattr(axis, f"{part}_color", _GREY)
    plot.outline_line_color = None
    plot.yaxis.axis_label = "probability"
    plot.grid.grid_line_alpha = 0.3
    for i, (name, label) in enumerate(zip(names[3:], ("top token", *targets), strict=True)):
        dash = ("solid", "dashed", "dotted", "dotdash")[i % 4]  # carries what colours would
        drawn = plot.line("x", name, source=source, legend_label=label, line_width=2, line_dash=dash)
        drawn.glyph.line_color = _LINES[i % len(_LINES)]
    plot.legend.background_fill_alpha, plot.legend.border_line_alpha, plot.legend.label_text_color = 0, 0, _GREY
    plot.legend.ncols = 3
    plot.add_layout(plot.legend[0], "below")
    return json_item(plot)
