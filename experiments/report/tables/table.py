"""A table of the paper as a function that gives the rows of one model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

from classifier_emergence.numbers import number
from classifier_emergence.results import lookup
from experiments.report.typeset import write_table

FOLDER = Path("paper/tables")
Result = Mapping[str, Any]
"""Of one stage on one model."""
Results = Mapping[str, Result]
"""Model -> result of one stage."""
Rows = Iterable[Sequence[str | int | None]]


@dataclass(frozen=True)
class Table:
    """The rows of every model under a first column with its name; see ``table``."""

    stage: str
    columns: str
    rows: Callable[[Result], Rows]
    first: str

    def write(self, results: Results) -> None:
        """Write the table under the name of its function, with the function's docstring as caption.

        A dotted key in braces there stands for a number of the first model's result.
        """
        caption = " ".join(cleandoc(self.rows.__doc__ or "").split())
        caption = re.sub("{(.*?)}", lambda key: number(lookup(next(iter(results.values())), key[1])), caption)
        rows = [[model, *row] for model, result in results.items() for row in self.rows(result)]
        columns = [self.first, *self.columns.replace("`", "").split(" | ")]
        tokens = re.findall("`(.*?)`", self.columns)
        write_table(FOLDER / self.rows.__name__, columns, rows, caption=caption, tokens=tokens)


def table(stage: str, columns: str, *, first: str = "Model") -> Callable[..., Table]:
    """Make a function that gives the rows of a model's result a table of the paper.

    Args:
        stage: Whose results it shows.
        columns: Titles after the first, between bars; in backquotes those of vocabulary tokens and prompts.
        first: Title of the first column; of the ledger's tables, which have a claim where others have a model.
    """
    return lambda rows: Table(stage, columns, rows, first)
