"""The schema of params.yaml: one class a section, every mistake reported by its dotted name."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import HubSource, ModelSource, PathSource, WheelSource, source_of
from classifier_emergence.tasks.arithmetic import Bank

Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    # strict: "4" is not 4 and 4.0 is not 4; a misspelt key is an error, never silently the default.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Probing(_Section):
    """Linear probes over layers (see ``probes``)."""

    C: float = Field(gt=0)
    folds: int = Field(ge=3)
    shuffles: int = Field(ge=1)
    reported_shuffles: int = Field(ge=20)
    seed: Seed
    attention_scale: float = Field(ge=0)


class LogitLens(_Section):
    """The logit lens over layers (see ``lens``)."""

    depth: Fraction
    null_words: int = Field(ge=20)
    resamples: int = Field(ge=100)
    seed: Seed


Operands = Annotated[list[int], Field(min_length=2, max_length=2)]


class DualReward(_Section):
    """Dual-reward training and its controls (see ``training``)."""

    depth: Fraction
    class_weight: Fraction
    rank: int = Field(ge=1)
    rank_all_layers: int = Field(ge=1)
    scale: float = Field(gt=0)
    steps: int = Field(ge=1)
    arm_steps: int = Field(ge=1)
    further_steps: int = Field(ge=1)
    every: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    samples: int = Field(ge=1)
    seeds: list[Seed] = Field(min_length=1)
    depths: list[Fraction]
    class_weights: list[Fraction]
    arbitrary_words: list[str] = Field(min_length=4, max_length=4)
    operands: dict[str, Operands]
    test_problems: int = Field(ge=1)
    curve_problems: int = Field(ge=4)
    random_removals: int = Field(ge=1)
    threshold: Fraction
    resamples: int = Field(ge=100)


class DualRewardLong(_Section):
    """Dual-reward runs at full length beside the first seed's."""

    seeds: list[Seed] = Field(min_length=1)


class LoraSft(_Section):
    """Plain LoRA fine-tuning on answers (see ``training``)."""

    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    steps: int = Field(ge=1)
    every: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    samples: int = Field(ge=1)
    seeds: list[Seed] = Field(min_length=1)
    operands: dict[str, Operands]
    test_problems: int = Field(ge=1)
    curve_problems: int = Field(ge=3)
    top: int = Field(ge=1)
    resamples: int = Field(ge=100)


class CotAlignment(_Section):
    """Fine-tuning on answers and on a word before the answer (see ``training``)."""

    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    steps: int = Field(ge=1)
    every: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    samples: int = Field(ge=1)
    seeds: list[Seed] = Field(min_length=1)
    operands: dict[str, Operands]
    test_problems: dict[str, int]
    new_tokens: int = Field(ge=1)
    depths: list[Fraction]
    resamples: int = Field(ge=100)


class OtherTasks(_Section):
    """Probes, lens and dual reward on tasks other than arithmetic (see ``classification``)."""

    items: int = Field(ge=8)
    folds: int = Field(ge=3)
    C: float = Field(gt=0)
    shuffles: int = Field(ge=1)
    null_words: int = Field(ge=20)
    depth: Fraction
    class_weight: Fraction
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    steps: int = Field(ge=1)
    every: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seeds: list[Seed] = Field(min_length=1)
    arbitrary_words: list[str] = Field(min_length=3, max_length=3)
    test_items: int = Field(ge=1)
    resamples: int = Field(ge=100)


class ReportedGrpo(_Section):
    """Settings of the originals, where they are known."""

    learning_rate: float = Field(gt=0)
    kl_weight: float = Field(ge=0)
    statements: int = Field(ge=10, multiple_of=2)
    trials: int = Field(ge=2)


class Grpo(_Section):
    """Reinforcement learning on answers (see ``grpo``)."""

    depth: Fraction
    probe_depth: Fraction
    steps: int = Field(ge=1)
    prompts: int = Field(ge=1)
    group: int = Field(ge=2)
    new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    kl_weight: float = Field(ge=0)
    every: int = Field(ge=1)
    seeds: list[Seed] = Field(min_length=1)
    shots: list[str]
    operands: dict[str, Operands]
    test_problems: int = Field(ge=1)
    reported: ReportedGrpo
    resamples: int = Field(ge=100)


class Collapse(_Section):
    """GRPO together with a loss on the lens (see ``grpo``); what is not here is as in section grpo."""

    class_weight: Fraction
    steps: int = Field(ge=1)
    prompts: int = Field(ge=1)
    every: int = Field(ge=1)
    checkpoint_every: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    vo_learning_rate: float = Field(gt=0)
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    curve_problems: int = Field(ge=3)
    modal_share: Fraction
    reported_prompts: int = Field(ge=1)
    reported_group: int = Field(ge=2)
    reported_steps: list[int] = Field(min_length=3, max_length=3)


class Staged(_Section):
    """Dual reward and GRPO one after the other; what is not here is as in dual_reward and collapse."""

    dual_steps: int = Field(ge=1)


class MoeRouters(_Section):
    """Routers of mixtures of experts (see ``experts``, ``routing``), and upcycling (see ``upcycling``)."""

    top: int = Field(ge=2)
    null_experts: int = Field(ge=2)
    draws: int = Field(ge=19)
    shuffles: int = Field(ge=19)
    pairs_per_token: int = Field(ge=1)
    resamples: int = Field(ge=100)
    seed: Seed
    discovery_rate: Fraction
    sparse_step: int = Field(ge=1)
    rank: int = Field(ge=1)
    scale: float = Field(gt=0)
    expert_steps: int = Field(ge=1)
    expert_learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1, multiple_of=5)  # as many texts of each of five domains
    samples: int = Field(ge=1)
    texts: int = Field(ge=2)
    test_texts: int = Field(ge=2)
    new_tokens: int = Field(ge=1)
    top_k: int = Field(ge=1)
    joint_steps: int = Field(ge=1)
    every: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    router_learning_rate: float = Field(gt=0)
    balance: float = Field(ge=0)
    seeds: list[Seed] = Field(min_length=1)
    operands: dict[str, Operands]
    test_problems: int = Field(ge=8)
    folds: int = Field(ge=3)
    depth: Fraction


class Params(_Section):
    """The whole of params.yaml."""

    models: list[str] = Field(min_length=1)
    registry: dict[str, ModelSource]
    bank: Bank
    probing: Probing
    logit_lens: LogitLens
    trained_models: list[str] = Field(min_length=1)
    dual_reward: DualReward
    dual_reward_long: DualRewardLong
    lora_sft: LoraSft
    cot_alignment: CotAlignment
    other_tasks: OtherTasks
    grpo: Grpo
    reinforcement_models: list[str] = Field(min_length=1)
    collapse: Collapse
    staged: Staged
    moe_models: list[str] = Field(min_length=1)
    moe_routers: MoeRouters
    confidence: Fraction

    @model_validator(mode="after")
    def _models_are_registered(self) -> "Params":
        for key in self.models:
            source_of(key, self.registry, parameter="models")
        for name in ("trained_models", "reinforcement_models"):
            for key in getattr(self, name):
                if key not in self.models:
                    raise ValueError(f"{name}: {key!r} is not among models, whose results it is compared with")
        for key in self.moe_models:
            source_of(key, self.registry, parameter="moe_models")
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises:
        InputError: The file is missing or is not YAML, a key is unknown, misspelt or missing, or a value has the
            wrong type or range. One line that names the first such parameter, with its dotted path.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); run from the repository root or pass --params"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected sections with names, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error, raw)}") from error


def _first_problem(error: ValidationError, raw: dict[str, Any]) -> str:
    # A misspelt key gives two problems, "unknown" and "missing"; the unknown one says more, so it comes first.
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    kinds = {"wheel", "hub", "path"}
    # pydantic puts the union tag (the source kind) into the location; it is not part of the dotted name.
    where = [str(part) for i, part in enumerate(problem["loc"]) if not (i == 2 and part in kinds)]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(where[:-1])
        near = difflib.get_close_matches(where[-1], siblings, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(siblings)}"
        return f"{name}: unknown parameter; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = f" (found {got!r})" if isinstance(got, str | int | float | bool) or got is None else ""
    if not name:  # a check over several sections names its parameter itself
        return message
    return f"{name}: {message[:1].lower() + message[1:]}{shown}"


def _fields_at(where: list[str]) -> list[str]:
    if where[:1] == ["registry"]:
        return sorted({*WheelSource.model_fields, *HubSource.model_fields, *PathSource.model_fields})
    section: Any = Params
    for part in where:
        section = section.model_fields[part].annotation
    return sorted(section.model_fields)
