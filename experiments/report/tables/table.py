"""A table of the paper as a function that gives the rows of one model."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
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


def table(
    *columns: str, tokens: Collection[str] = (), n: str = ""
) -> Callable[[Callable[[Result], Rows]], Callable[[Results], None]]:
    """Make a function that gives a model's rows into one that writes the table of all models.

    Its name is the table's, its docstring the caption. A first column "Model" is added.

    Args:
        columns: The other columns.
        tokens: Those with vocabulary tokens or prompts.
        n: Key of a number of the first model's result that stands for ``{n}`` in the caption.
    """

    def decorate(rows_of: Callable[[Result], Rows]) -> Callable[[Results], None]:
        @wraps(rows_of)
        def write(results: Results) -> None:
            caption = " ".join(cleandoc(rows_of.__doc__ or "").split())
            if n:
                caption = caption.format(n=lookup(next(iter(results.values())), n))
            rows = [[model, *row] for model, result in results.items() for row in rows_of(result)]
            write_table(FOLDER / rows_of.__name__, ["Model", *columns], rows, caption=caption, tokens=tokens)

        return write

    return decorate
