"""A table of the paper as a function that gives the rows of one model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

from classifier_emergence.results import lookup
from experiments.report.typeset import write_table

FOLDER = Path("paper/tables")
Result = Mapping[str, Any]
"""Of one stage on one model."""
Results = Mapping[str, Result]
"""Model -> result of one stage."""
Rows = Iterable[Sequence[str | int]]


@dataclass(frozen=True)
class Table:
    """The rows of every model under a first column with its name; see ``table``."""

    stage: str
    columns: str
    rows: Callable[[Result], Rows]
    n: str

    def write(self, results: Results) -> None:
        """Write the table under the name of its function, with the function's docstring as caption."""
        caption = " ".join(cleandoc(self.rows.__doc__ or "").split())
        if self.n:
            caption = caption.format(n=lookup(next(iter(results.values())), self.n))
        rows = [[model, *row] for model, result in results.items() for row in self.rows(result)]
        columns = ["Model", *self.columns.replace("`", "").split(" | ")]
        tokens = re.findall("`(.*?)`", self.columns)
        write_table(FOLDER / self.rows.__name__, columns, rows, caption=caption, tokens=tokens)


def table(stage: str, columns: str, *, n: str = "") -> Callable[..., Table]:
    """Make a function that gives the rows of a model's result a table of the paper.

    Args:
        stage: Whose results it shows.
        columns: Titles after "Model", between bars; in backquotes those of vocabulary tokens and prompts.
        n: Key of a number of the first model's result that stands for ``{n}`` in the caption.
    """
    return lambda rows: Table(stage, columns, rows, n)
