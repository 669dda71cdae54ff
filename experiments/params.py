"""The schema of params.yaml: one class a section, every mistake reported by its dotted name."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from classifier_emergence.models.registry import ModelSource, read_parameters, source_of
from classifier_emergence.tasks.arithmetic import Bank

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Keys = Annotated[list[str], Field(min_length=1)]
Folds = Annotated[int, Field(ge=3)]
Words = Annotated[int, Field(ge=20)]  # of a null
Resamples = Annotated[int, Field(ge=100)]
RELABELLINGS = 24**3 - 1
"""Ways to relabel four folds of four prompts, one of each class, that are more than other names for the classes."""
Ranges = dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]


AT_SIZE = ("dual_reward", "lora_sft", "cot_alignment", "replication")
"""Sections that may differ by model."""


class _Section(BaseModel):
    # strict: "4" is not 4 and 4.0 is not 4; a misspelt key is an error, never silently the default.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Update(_Section):
    """A low-rank update of weights."""

    rank: Count
    scale: Positive


class Training(_Section):
    """Any training."""

    steps: Count
    every: Count
    learning_rate: Positive


class Supervised(Update, Training):
    """Training of an adapter by cross-entropy (see ``training.supervised``), over seeds."""

    batch_size: Count
    seeds: Seeds
    resamples: Resamples


class OnProblems(Supervised):
    """The same on arithmetic problems."""

    samples: Count
    operands: Ranges


class Probing(_Section):
    """Linear probes over layers."""

    C: Positive
    folds: Folds
    shuffles: Count
    reported_shuffles: Annotated[int, Field(ge=20, le=RELABELLINGS)]
    direction_shuffles: Words
    null_words: Words
    seed: Seed
    attention_scale: NonNegative


class LogitLens(_Section):
    """The logit lens over layers."""

    depth: Fraction
    null_words: Words
    resamples: Resamples
    seed: Seed
    embedding_multiplier: Positive
    logits_divisor: Positive


class DualReward(OnProblems):
    """Dual-reward training and its controls."""

    depth: Fraction
    class_weight: Fraction
    rank_all_layers: Count
    arm_steps: Count
    further_steps: Count
    depths: list[Fraction]
    class_weights: list[Fraction]
    arbitrary_words: list[str] = Field(min_length=4, max_length=4)
    test_problems: Count
    curve_problems: int = Field(ge=4)
    random_removals: Count
    threshold: Fraction
    arms: Literal["all"] | Annotated[list[str], Field(min_length=1)]


class DualRewardLong(_Section):
    """Dual-reward runs at full length beside the first seed's."""

    seeds: Seeds


class SampleEfficiency(_Section):
    """Dual reward on few problems; what is not here is as in dual_reward."""

    problems: list[Annotated[int, Field(ge=4, multiple_of=4)]] = Field(min_length=1)  # as many of each operation
    learning_rates: list[Positive] = Field(min_length=1)
    steps: Count
    every: Count


class LoraSft(OnProblems):
    """Plain LoRA fine-tuning on answers."""

    test_problems: Count
    curve_problems: int = Field(ge=3)
    top: Count


class CotAlignment(OnProblems):
    """Fine-tuning on answers and on a word before the answer."""

    test_problems: dict[str, int]
    new_tokens: Count
    depths: list[Fraction]


class TunedLens(_Section):
    """Training of a tuned lens (see ``reading.tuned_lens.Tuning``)."""

    steps: Count
    positions: Count
    learning_rate: Positive
    every: Count
    top: Count
    tail: Count


class Lenses(_Section):
    """Lenses other than the logit lens: text that they are fitted on, and what they read."""

    texts: Count
    new_tokens: Count
    test_texts: Count
    validation_texts: Count
    test_positions: Count
    skip: Count
    jacobian_texts: Count
    jacobian_tokens: Count
    word_texts: Annotated[int, Field(ge=1, le=6)]
    word_nulls: Count
    tuned: TunedLens
    pairs: int = Field(ge=8, multiple_of=8)
    control_seeds: Seeds
    control_texts: Count
    problems: int = Field(ge=8)
    seed: Seed


class TrainedWords(_Section):
    """Trained words under another lens; how they are trained is in the sections of the stages that do."""

    seeds: Seeds
    chain_steps: Count


class Replication(_Section):
    """Trainings that are made again with other seeds; how is in the sections of the stages that made them first."""

    seeds: dict[Literal["grpo", "dual_then_grpo", "dual_reward", "direct"], Annotated[Seeds, Field(min_length=2)]]
    test_problems: Count


class Conversations(_Section):
    """What a model that follows instructions replies to requests."""

    new_tokens: Count


class Tuning(Update, Training):
    """A base model made to follow instructions; its dual reward is as in section dual_reward."""

    teacher: str
    chat: Annotated[str, Field(pattern=r"\{request\}")]
    batch_size: Count
    seeds: Seeds
    reward_every: Count


class OtherTasks(Supervised):
    """Probes, lens and dual reward on tasks other than arithmetic (see ``tasks.classification``)."""

    items: int = Field(ge=8)
    folds: Folds
    C: Positive
    shuffles: Count
    null_words: Words
    depth: Fraction
    class_weight: Fraction
    arbitrary_words: list[str] = Field(min_length=3, max_length=3)
    test_items: Count


class ReportedGrpo(_Section):
    """Settings of the originals, where they are known."""

    learning_rate: Positive
    kl_weight: NonNegative
    statements: int = Field(ge=10, multiple_of=2)
    trials: int = Field(ge=2)


class Grpo(Training):
    """Reinforcement learning on answers (see ``training.rl``)."""

    depth: Fraction
    probe_depth: Fraction
    prompts: Count
    group: int = Field(ge=2)
    new_tokens: Count
    temperature: Positive
    kl_weight: NonNegative
    seeds: Seeds
    shots: list[str]
    operands: Ranges
    test_problems: Count
    reported: ReportedGrpo
    resamples: Resamples


class Collapse(Update, Training):
    """GRPO together with a loss on the lens; what is not here is as in section grpo."""

    class_weight: Fraction
    prompts: Count
    checkpoint_every: Count
    vo_learning_rate: Positive
    curve_problems: int = Field(ge=3)
    modal_share: Fraction
    class_loss: Positive
    cause_steps: Count
    gradient_draws: int = Field(ge=2)
    gradient_problems: Count
    reported_prompts: Count
    reported_group: int = Field(ge=2)
    reported_steps: list[int] = Field(min_length=3, max_length=3)


class Staged(_Section):
    """Dual reward and GRPO one after the other; what is not here is as in dual_reward and collapse."""

    dual_steps: Count
    low_rate: Positive
    high_rate: Positive
    kept_class_weight: Fraction


class MoeRouters(Update):
    """Routers of mixtures of experts, and upcycling (see ``mixtures``)."""

    top: int = Field(ge=2)
    null_experts: int = Field(ge=20)
    planted: list[Fraction] = Field(min_length=1)
    planted_rows: Count
    draws: int = Field(ge=19)
    shuffles: int = Field(ge=19)
    pairs_per_token: Count
    resamples: Resamples
    seed: Seed
    discovery_rate: Fraction
    sparse_step: Count
    expert_steps: Count
    expert_learning_rate: Positive
    batch_size: int = Field(ge=1, multiple_of=5)  # as many texts of each of five domains
    samples: Count
    texts: int = Field(ge=2)
    test_texts: int = Field(ge=2)
    new_tokens: Count
    top_k: Count
    joint_steps: Count
    every: Count
    learning_rate: Positive
    router_learning_rate: Positive
    balance: NonNegative
    seeds: Seeds
    operands: Ranges
    test_problems: int = Field(ge=8)
    folds: Folds
    depth: Fraction


class Params(_Section):
    """The whole of params.yaml."""

    models: Keys
    registry: dict[str, ModelSource]
    bank: Bank
    probing: Probing
    logit_lens: LogitLens
    supervised_models: Keys
    trained_models: Keys
    lens_models: Keys
    at_size: dict[str, dict[str, dict[str, Any]]]
    dual_reward: DualReward
    dual_reward_long: DualRewardLong
    sample_efficiency: SampleEfficiency
    lora_sft: LoraSft
    cot_alignment: CotAlignment
    lenses: Lenses
    trained_words: TrainedWords
    teachers: Keys
    conversations: Conversations
    tuning_models: Keys
    tuning: Tuning
    other_tasks: OtherTasks
    grpo: Grpo
    grpo_models: Keys
    reinforcement_models: Keys
    collapse: Collapse
    staged: Staged
    replication_models: Keys
    replication: Replication
    moe_models: Keys
    moe_routers: MoeRouters
    confidence: Fraction

    @model_validator(mode="after")
    def _models_are_registered(self) -> "Params":
        for key in self.models:
            source_of(key, self.registry, parameter="models")
        of = {
            "supervised_models": "models", "trained_models": "supervised_models", "lens_models": "trained_models",
            "teachers": "models", "tuning_models": "trained_models", "grpo_models": "models",
            "reinforcement_models": "grpo_models", "replication_models": "supervised_models",
        }  # fmt: skip
        for name, larger in of.items():
            for key in getattr(self, name):
                if key not in getattr(self, larger):
                    raise ValueError(f"{name}: {key!r} is not among {larger}, whose results it is compared with")
        if self.tuning.teacher not in self.teachers:
            raise ValueError(f"tuning.teacher: {self.tuning.teacher!r} is not among teachers, who write conversations")
        for key in self.moe_models:
            source_of(key, self.registry, parameter="moe_models")
        if {*self.at_size} != {*self.supervised_models}:
            raise ValueError("at_size: give one entry for each of supervised_models, {} if nothing differs")
        for key, sections in self.at_size.items():
            if "replication" in sections and key not in self.replication_models:
                raise ValueError(f"at_size.{key}.replication: {key!r} is not among replication_models")
            self.of_model(key)
        return self

    def of_model(self, key: str) -> "Params":
        """With what differs on the model (``at_size``) in its place.

        Raises:
            ValueError: A section or parameter that does not exist, or a value of the wrong type or range; names it.
        """
        changed = {}
        for section, values in self.at_size.get(key, {}).items():
            if section not in AT_SIZE:
                raise ValueError(f"at_size.{key}.{section}: no such section; known: {', '.join(AT_SIZE)}")
            now = getattr(self, section)
            try:
                changed[section] = type(now).model_validate({**now.model_dump(), **values})
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, ("at_size", key, section, *problem["loc"])))
                raise ValueError(f"{where}: {problem['msg']}") from error
        return self.model_copy(update=changed)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file.

    Raises:
        InputError: The file is missing or is not YAML, a key is unknown, misspelt or missing, or a value has the
            wrong type or range. One line that names the first such parameter, with its dotted path.
    """
    return read_parameters(Path(path), Params)
