"""A study that is a model alone."""

from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from experiments.params import Params


def build(params: Params, key: str) -> LanguageModel:
    """The model, for ``Runs``."""
    return load(key, params.registry)
