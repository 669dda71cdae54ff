"""Packages that not everyone needs: each comes with an extra of this package (``classifier-emergence[train]``)."""

from collections.abc import Iterator
from contextlib import contextmanager

from classifier_emergence.errors import InputError

_EXTRAS = {
    "train": ("accelerate", "peft"),
    "rl": ("datasets", "pyarrow", "trl"),
    "wheels": ("gguf", "pip"),
    "plot": ("bokeh", "matplotlib"),
    "paper": ("dvc", "jinja2", "networkx", "typst"),
}


@contextmanager
def missing_extras_named() -> Iterator[None]:
    """Say which extra is missing where an import fails, in the place of a ``ModuleNotFoundError``.

    Raises:
        InputError: A package of one of the extras is not installed.

    Example:
        >>> with missing_extras_named():
        ...     import matplotlib
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        for extra, packages in _EXTRAS.items():
            if package in packages:
                advice = f'pip install "classifier-emergence[{extra}]"'
                raise InputError(f"{package}: not installed; it comes with the extra {extra!r}: {advice}") from error
        raise
