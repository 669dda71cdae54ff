"""Instruments for vocabulary-aligned classifiers in language models; import from here in a notebook.

Each function takes a ``LanguageModel``: ``open_model`` loads one, ``LanguageModel("mine", model, tokenizer)`` wraps
what is in memory. It gives a frozen reading with ``to_dict()``, ``to_frame()`` and ``plot()``.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from classifier_emergence.extras import missing_extras_named

if TYPE_CHECKING:
    from classifier_emergence.instruments.comparison import compare as compare
    from classifier_emergence.instruments.direction import direction as direction
    from classifier_emergence.instruments.finetune import dual_reward as dual_reward
    from classifier_emergence.instruments.finetune import sft as sft
    from classifier_emergence.instruments.grpo import grpo as grpo
    from classifier_emergence.instruments.kept_probe import KeptProbe as KeptProbe
    from classifier_emergence.instruments.lens import lens as lens
    from classifier_emergence.instruments.lens_map import lens_map as lens_map
    from classifier_emergence.instruments.probe import probe as probe
    from classifier_emergence.instruments.routing import routing_usage as routing_usage
    from classifier_emergence.instruments.routing import trace_texts as trace_texts
    from classifier_emergence.models.loading import open_model as open_model
    from classifier_emergence.reading.estimator import LayerProbes as LayerProbes
    from classifier_emergence.reading.model import LanguageModel as LanguageModel

__version__ = "1.3.0"

# Before huggingface_hub is imported, which reads it once.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_HOME = {
    "KeptProbe": "instruments.kept_probe",
    "LanguageModel": "reading.model",
    "LayerProbes": "reading.estimator",
    "compare": "instruments.comparison",
    "direction": "instruments.direction",
    "dual_reward": "instruments.finetune",
    "grpo": "instruments.grpo",
    "lens": "instruments.lens",
    "lens_map": "instruments.lens_map",
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
