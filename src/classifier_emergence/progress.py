"""Progress with time left, on the terminal only: silent in pipes and logs except for one line a task."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress(description: str | None, *, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error; yields ``advance(amount)``. No description, no bar."""
    console = Console(stderr=True)
    if description is None:
        yield lambda amount: None
        return
    if not console.is_terminal:
        console.print(description, markup=False, highlight=False)
        yield lambda amount: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
