"""Progress with time left, on the terminal only: silent in pipes and logs except for one line a task."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from unittest.mock import patch

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from classifier_emergence.processes import is_first


@contextmanager
def progress(description: str | None, *, total: float) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields ``advance(amount, status="")``. No description, no bar."""
    console = Console(stderr=True, quiet=not is_first())
    if description is None or not console.is_terminal:
        if description is not None:
            console.print(description, markup=False, highlight=False)
        yield lambda amount, status="": None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, status="")

        def advance(amount: float, status: str = "") -> None:
            bar.advance(task, amount)
            if status:
                bar.update(task, status=status)

        yield advance


def notice(text: str) -> None:
    """One line on standard error about something that needs no answer; what is in it cannot steer a terminal."""
    shown = "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text)
    Console(stderr=True, soft_wrap=True).print(shown, markup=False, highlight=False)


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Keeps the bars that other libraries draw out of pipes and logs; warnings and errors still come."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]  # what all of them draw with, and late: the command line's help needs none

    if sys.stderr.isatty():
        yield
        return
    with patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)):
        yield
