"""The models of the original write-ups, model by model and stage by stage: the profile ``params.originals.yaml``.

Every stage is a process of its own, with the numbers of the base parameters, and writes its result beside those of the
paper's models. What has a result is not run again, so that the same command goes on after an error or an interrupt.
"""

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import HubSource, read_parameters, source_of
from classifier_emergence.models.sources import commit_of
from classifier_emergence.progress import notice
from classifier_emergence.results import write_text_atomic
from experiments.params import load_params
from experiments.report.ledger import judge_present
from experiments.shared.stage import RESULTS, STAGES, residuals_path, result_path

PINNED = Path("data/originals.yaml")
"""The base parameters with the commits that the hub gave for what the profile does not pin."""
CLAIMS = RESULTS / "claims.originals.json"
Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Unpinned(_Section):
    """A repository of which the first run takes the newest commit."""

    repo: str
    licence: str


class Original(_Section):
    """What is run on a model, and estimates of what that takes."""

    stages: list[Literal[tuple(STAGES)]]  # type: ignore[valid-type]
    memory_gb: Positive
    minutes: dict[Literal["cpu", "gpu"], Positive]


class Profile(_Section):
    """The schema of ``params.originals.yaml``."""

    base: str
    unpinned: dict[str, Unpinned] = {}
    models: dict[str, Original]


def load_profile(file: Path, picks: Collection[str]) -> Profile:
    """The profile with the picked models alone (none: all).

    Raises:
        InputError: The file is no profile, or has no such model.
    """
    profile = read_parameters(file, Profile)
    if unknown := [key for key in picks if key not in profile.models]:
        raise InputError(f"{unknown[0]!r}: no model of {file}; known: {', '.join(profile.models)}")
    models = {key: entry for key, entry in profile.models.items() if not picks or key in picks}
    return profile.model_copy(update={"models": models})


def left(key: str, entry: Original) -> list[str]:
    """The stages of a model that have no result yet, in the order in which they need each other."""
    return [stage for stage in STAGES if stage in entry.stages and not _out(stage, key).exists()]


def run_originals(profile: Profile) -> list[str]:
    """Run what is left and return what failed; a model whose stage failed is given up, the others go on."""
    failed = []
    for key, entry in profile.models.items():
        try:
            pinned = _pinned(profile, key)
        except InputError as error:
            notice(f"error: {error}")
            failed.append(key)
            continue
        for stage in left(key, entry):
            notice(f"{stage}@{key}")
            command = [sys.executable, "-m", f"experiments.stages.{stage}", "--model", key, "--params", str(pinned)]
            if code := subprocess.run(command, check=False).returncode:
                if code == 130:
                    raise KeyboardInterrupt
                failed.append(f"{stage}@{key}")
                break
    return failed


def judge_originals(profile: Profile) -> dict[str, Any]:
    """Judge every claim by the results of the base's models and the originals that there are: ``CLAIMS``."""
    params = load_params(profile.base)
    models = list(dict.fromkeys([*params.models, *params.moe_models, *profile.models]))
    return judge_present(models, params.confidence, CLAIMS)


def _out(stage: str, key: str) -> Path:
    return residuals_path(key) if stage == "residuals" else result_path(stage, key)


def _pinned(profile: Profile, key: str) -> Path:
    """A parameter file whose registry has the model."""
    if key not in profile.unpinned:
        source_of(key, load_params(profile.base).registry, parameter="models")
        return Path(profile.base)
    raw = yaml.safe_load(Path(profile.base).read_text(encoding="utf-8"))
    known = load_params(PINNED).registry if PINNED.exists() else {}
    if key not in known:
        entry = profile.unpinned[key]
        commit = commit_of(entry.repo)
        notice(f"{key}: {entry.repo} at commit {commit}, the newest that the hub has; later runs keep to it")
        known[key] = HubSource(source="hub", repo=entry.repo, revision=commit, licence=entry.licence)
    raw["registry"] |= {name: known[name].model_dump() for name in profile.unpinned if name in known}
    write_text_atomic(PINNED, yaml.safe_dump(raw, sort_keys=False))
    return PINNED
