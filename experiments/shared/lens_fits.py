"""What stages that fit lenses share: maps that are kept until a stage is done, and layers chosen on other prompts."""

import shutil
from collections.abc import Callable, Sequence

import numpy as np
from safetensors import SafetensorError

from classifier_emergence.manifest import file_damage, seal_file
from classifier_emergence.progress import notice
from classifier_emergence.reading.lens_maps import LensMaps
from experiments.shared.runs import Runs

FITS = 2
"""Of a lens, on disjoint texts: what holds of it holds of each."""


def kept_maps(runs: Runs, name: str, make: Callable[[], LensMaps]) -> LensMaps:
    """Maps that were made before by this code on these parameters and weights, else made and kept."""
    file = runs.folder / "maps" / f"{name}-{runs.state[:16]}.safetensors"
    try:
        if file_damage(file) is None:
            return LensMaps.load(file)
        notice(f"{file}: another sha256; made again")
    except FileNotFoundError:
        pass
    except (SafetensorError, TypeError, OSError):
        notice(f"{file}: damaged; made again")
        for path in file.parent.glob(f"{file.name}*"):
            shutil.rmtree(path, ignore_errors=True)  # should it be a folder
    maps = make()
    maps.save(file)
    seal_file(file, file)
    return maps


def selected(right: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Of ``right`` (layers, n) for each half of the clusters the layer that is best on the other half: (n,), and which.

    The last layer, which is the model's own output under every lens, and the embedding are no candidates.
    """
    half = np.unique(clusters, return_inverse=True)[1] % 2
    hits, rows = np.zeros(len(half), dtype=bool), []
    for side in (0, 1):
        rows.append(1 + int(right[1:-1, half != side].mean(-1).argmax()))
        hits[half == side] = right[rows[-1], half == side]
    return hits, rows
