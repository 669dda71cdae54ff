"""Instruments for vocabulary-aligned classifiers in language models; import from here in a notebook.

Each function takes a ``LanguageModel``: ``open_model`` loads one, ``LanguageModel("mine", model, tokenizer)`` wraps
what is in memory. It gives a frozen reading with ``to_dict()``, ``to_frame()`` and ``plot()``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from classifier_emergence.extras import missing_extras_named

if TYPE_CHECKING:
    from classifier_emergence.instruments.direction import direction
    from classifier_emergence.instruments.finetune import dual_reward, sft
    from classifier_emergence.instruments.grpo import grpo
    from classifier_emergence.instruments.lens import lens
    from classifier_emergence.instruments.probe import probe
    from classifier_emergence.instruments.routing import routing_usage, trace_texts
    from classifier_emergence.models.loading import open_model
    from classifier_emergence.reading.estimator import LayerProbes
    from classifier_emergence.reading.model import LanguageModel

__version__ = "0.1.0"
__all__ = [
    "LanguageModel",
    "LayerProbes",
    "direction",
    "dual_reward",
    "grpo",
    "lens",
    "open_model",
    "probe",
    "routing_usage",
    "sft",
    "trace_texts",
]

_HOME = {
    "LanguageModel": "reading.model",
    "LayerProbes": "reading.estimator",
    "direction": "instruments.direction",
    "dual_reward": "instruments.finetune",
    "grpo": "instruments.grpo",
    "lens": "instruments.lens",
    "open_model": "models.loading",
    "probe": "instruments.probe",
    "routing_usage": "instruments.routing",
    "sft": "instruments.finetune",
    "trace_texts": "instruments.routing",
}


def __getattr__(name: str) -> Any:
    # Late: the command line starts without the seconds that torch and transformers take.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with missing_extras_named():
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
