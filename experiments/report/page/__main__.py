"""Stage page: paper/index.html, the paper as one file to explore, and docs/REPRODUCING.md, what a reviewer runs.

The same results give the same bytes. The page holds its library and data, and asks no server for anything.
"""

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from classifier_emergence.numbers import ends_text, number
from classifier_emergence.results import script_json, write_text_atomic
from classifier_emergence.trace import judged, origins
from experiments.params import load_params
from experiments.report.names import NAMES, model_name
from experiments.report.page import plot, reproducing, tables
from experiments.report.page.explorers import EXPLORERS, prompts
from experiments.shared.stage import STAGES, exit_on_bad_input, results_of

HERE = Path(__file__).parent
PAGE, GUIDE = Path("paper/index.html"), Path("docs/REPRODUCING.md")
TITLE = "Does training make a vocabulary-aligned classifier emerge?"
READ = ("probing", "other_tasks", "logit_lens", "dual_reward_long", "lora_sft", "cot_alignment", "grpo", "collapse",
        "moe_routers")  # fmt: skip
"""Stages whose results the figures show."""
MARKS = {
    "supported": "✓", "reported protocol only": "◐", "mixed by model": "◑", "contradicted": "✗", "inconclusive": "?",
    "untested": "–",
}  # fmt: skip
REPRODUCED = {
    "yes": ("●", "number reproduced"),
    "no": ("○", "not reproduced"),
    "not comparable": ("·", "not comparable"),
}


def build() -> str:
    """The page.

    Raises:
        InputError: A result, table or ledger is missing or damaged; names the file.
    """
    params = load_params()
    results = {stage: results_of(stage, params) for stage in READ}
    claims, predictions = (_traced(name, items) for name, items in judged(Path()).items())
    drawn = {"plot": plot.plot(), "explorers": [each.data(results) for each in EXPLORERS], "prompts": prompts(results)}
    return (
        _environment(html=True)
        .get_template("page.html")
        .render(
            title=TITLE,
            claims=claims,
            predictions=predictions,
            counts=_counts(claims),
            groups=_groups(claims),
            marks=MARKS,
            reproduced_marks=REPRODUCED,
            explorers=EXPLORERS,
            tables=tables.shown(),
            bokeh=version("bokeh"),
            style=_raw("page.css"),
            script=_raw("page.js"),
            library=Markup(plot.library()),
            data=Markup(script_json(drawn)),
        )
    )


def guide() -> str:
    """The guide for reviewers.

    Raises:
        InputError: The judged claims are missing or damaged; names the file.
    """
    params, claims, pipeline = load_params(), judged(Path())["claims"], reproducing.read_pipeline()
    stages = [f"{stage}@{model}" for stage, models in STAGES.items() for model in getattr(params, models)]
    return (
        _environment(html=False)
        .get_template("reproducing.md")
        .render(
            rows=[(row, reproducing.costs(pipeline, row.stage)) for row in reproducing.expected(claims)],
            stages=[(stage, reproducing.costs(pipeline, stage)) for stage in stages],
            away={key: item for key, item in claims.items() if item["headline"] == "untested"},
            counts=_counts(claims),
            confidence=params.confidence,
            models=[(key, params.registry[key]) for key in dict.fromkeys([*params.models, *params.moe_models])],
        )
    )


def run() -> None:
    """Write both."""
    write_text_atomic(PAGE, build())
    write_text_atomic(GUIDE, guide())


def _environment(*, html: bool) -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=html, undefined=StrictUndefined, keep_trailing_newline=True
    )
    made.filters |= {
        "model": model_name,
        "number": lambda x: number(x, 3),
        "interval": ends_text,
        "slug": lambda text: text.replace(" ", "-"),
    }
    return made


def _traced(ledger: str, items: Mapping[str, Any]) -> dict[str, Any]:
    """A judged ledger, each piece of evidence with its origin, the primary test first."""
    chains = origins(Path(), ledger, items)
    pieces = {key: zip(item["evidence"], chains[key], strict=True) for key, item in items.items()}
    return {key: {**item, "pieces": sorted(pieces[key], key=lambda pair: not pair[0]["primary"])}
            for key, item in items.items()}  # fmt: skip


def _counts(claims: Mapping[str, Any]) -> dict[str, int]:
    found = Counter(item["headline"] for item in claims.values())
    return {headline: found[headline] for headline in MARKS if found[headline]}


def _groups(claims: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims by question, where the paper's names sort them; the others, if any, at the end."""
    asked = NAMES.get("questions", {}).values()
    groups = [{"title": each["title"], "claims": [key for key in each["claims"] if key in claims]} for each in asked]
    rest = [key for key in claims if not any(key in group["claims"] for group in groups)]
    return groups + ([{"title": "Others" if groups else "", "claims": rest}] if rest else [])


def _raw(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8").rstrip("\n"))


if __name__ == "__main__":
    exit_on_bad_input(run)
