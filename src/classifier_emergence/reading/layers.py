"""How layers are named and counted, in one place.

A residual stream has ``n_layers + 1`` rows: row 0 is the embedding (``emb``), row i + 1 the state after block i
(``L{i}``), so that our L-numbers equal the sources'.
"""

import numpy as np
from numpy.typing import ArrayLike


def layer_labels(n_layers: int) -> list[str]:
    """Labels of the rows: ``emb``, ``L0`` ... ``L{n_layers - 1}``."""
    return ["emb", *(f"L{i}" for i in range(n_layers))]


def layer_row(layer: int) -> int:
    """Row of the state after block ``layer`` (0-based). Here alone 1 is added."""
    return layer + 1


def layer_of(row: int) -> int:
    """Block (0-based) whose output a row is, the inverse of ``layer_row``; -1 for the embedding."""
    return row - 1


def layer_at(depth: float, n_layers: int) -> int:
    """The sources' layer at a relative depth: ``int(depth * n_layers)``."""
    return int(depth * n_layers)


def row_at(depth: float, n_layers: int) -> int:
    """Row of the state after the layer at a relative depth."""
    return layer_row(layer_at(depth, n_layers))


def peak_row(values: ArrayLike) -> int:
    """Row of the largest of ``values`` (rows,), the first if several are; the embedding does not count."""
    blocks = np.asarray(values, dtype=np.float64)[layer_row(0) :]
    return layer_row(int(blocks.argmax()))
