"""Progress with time left, on the terminal only: silent in pipes and logs except for one line a task."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr

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


def no_bars_in_logs() -> AbstractContextManager[object]:
    """Keeps bars that other libraries draw out of pipes and logs, with all else that they write on standard error."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
