"""The prompts and words of ``prompts.yaml``, as they stand there."""

from importlib import resources
from typing import Any

import yaml

PROMPTS: dict[str, Any] = yaml.safe_load(
    resources.files("classifier_emergence.tasks").joinpath("prompts.yaml").read_text(encoding="utf-8")
)
