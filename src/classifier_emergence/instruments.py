"""The paper's instruments on anyone's model, prompts and words; import from here in a notebook.

Each function takes a ``LanguageModel``: ``open_model`` loads one, ``LanguageModel("mine", model, tokenizer)`` wraps
what is in memory. It gives a frozen reading with ``to_dict()``, ``to_frame()`` and ``plot()``.
"""

from classifier_emergence.catalogue import open_model
from classifier_emergence.estimator import LayerProbes
from classifier_emergence.finetuning import dual_reward, sft
from classifier_emergence.instrument_direction import direction
from classifier_emergence.instrument_grpo import grpo
from classifier_emergence.instrument_lens import lens
from classifier_emergence.instrument_probe import probe
from classifier_emergence.instrument_routing import routing_usage, trace_texts
from classifier_emergence.models import LanguageModel

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
