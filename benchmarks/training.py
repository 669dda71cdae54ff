"""A step of dual-reward training against the same loss written plainly for ``transformers.Trainer``.

``python -m benchmarks.training gemma-3-270m [--steps N] [--members M]`` trains the main arm of params.yaml with both,
from the same adapter on the same batches, in turns, and keeps the seconds of a step (forward, backward and optimiser)
in results/benchmarks/training.json: ours alone, and M seeds that train together, by member. The plain loss takes the
model's logits at all positions, and the lens's too: final norm and unembedding of the whole hidden state, of which one
position is read. All losses must agree at every step.
"""

import argparse
import sys
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.recorded import compared, float32_limit, keep_comparison
from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import find_readout
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS
from classifier_emergence.tasks.problems import sample, split
from classifier_emergence.training.adapters import Adapter, Start, adapted_together
from classifier_emergence.training.examples import Example, Objective, encode
from classifier_emergence.training.modules import VO
from classifier_emergence.training.supervised import LensTrainer, Member
from experiments.params import DualReward, load_params

ROUNDS = 2
TOLERANCE = 1e-3  # nats; float32 in another order of sums, through some steps of Adam


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.started)


class PlainTrainer(Trainer):
    """The loss as one would write it first."""

    objective: Objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Lens and answer from full logits."""
        read, target = inputs.pop("read"), inputs.pop("target")
        output = model(**inputs, output_hidden_states=True)
        base = model.get_base_model()
        state = output.hidden_states[layer_row(self.objective.layer)]
        lens = base.get_output_embeddings()(find_readout(base).norm(state))
        class_loss = functional.cross_entropy(lens[torch.arange(len(read)), read], target)
        weight = self.objective.class_weight
        return weight * class_loss + (1 - weight) * output.loss


def plain_batch(batch: list[Example]) -> dict[str, Tensor]:
    """Padded ids, mask and labels, as for any causal language model."""
    width = max(len(example.ids) for example in batch)
    ids, mask, labels = [], [], []
    for example in batch:
        rest = width - len(example.ids)
        ids.append(example.ids + [0] * rest)
        mask.append([1] * len(example.ids) + [0] * rest)
        labels.append([-100] * example.prompt_length + example.ids[example.prompt_length :] + [-100] * rest)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "read": torch.tensor([example.prompt_length - 1 for example in batch]),
        "target": torch.tensor([example.target for example in batch]),
    }


def measure(
    lm: LanguageModel, settings: DualReward, examples: list[Example], steps: int, members: int
) -> tuple[list[float], list[float]]:
    """Seconds of every step of fresh runs, and the losses of the first; no members are the plain loss."""
    layer = layer_at(settings.depth, lm.n_layers)
    objective = Objective(settings.class_weight, layer)
    place = Adapter(VO, settings.rank, settings.scale, tuple(range(layer)))
    starts = {f"seed-{seed}": Start(place, seed) for seed in range(members or 1)}
    with tempfile.TemporaryDirectory() as work, adapted_together(lm, starts) as wrapped:
        arguments = TrainingArguments(
            output_dir=work,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0 if members else 1.0,  # ours clips by member
            logging_steps=1,
            save_strategy="no",
            seed=0,
            data_seed=0,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        )
        trainer: Trainer
        if not members:
            trainer = PlainTrainer(wrapped, arguments, plain_batch, examples)
            trainer.objective = objective
        else:
            together = {name: Member(examples, objective, start.seed) for name, start in starts.items()}
            trainer = LensTrainer(lm, wrapped, arguments, together, settings.batch_size)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = "seed-0/loss" if members else "loss"
        return clock.seconds, [entry[loss] for entry in trainer.state.log_history if loss in entry]


def examples_of(lm: LanguageModel, settings: DualReward) -> list[Example]:
    """The problems that stage dual_reward trains on."""
    problems = split(settings.operands, dict.fromkeys(settings.operands, settings.test_problems), seed=0)
    targets = {operation: word_tokens(operation, lm.tokenizer).strict_id for operation in OPERATIONS}
    return [
        encode(lm.tokenizer, problem.symbol, f" {problem.answer}", targets[problem.operation])
        for problem in sample(problems.train, settings.samples, seed=0)
    ]


def needed(lm: LanguageModel, batches: list[list[Example]]) -> float:
    """Operations of a step, a mean: forward, and backward to the states as the weights are frozen.

    Two each way for each weight of the blocks and token, and of the unembedding for each token of an answer and each
    prompt that the lens reads.
    """
    blocks = sum(weight.numel() for block in lm.blocks for weight in block.parameters())
    examples = [example for batch in batches for example in batch]
    tokens = sum(len(example.ids) for example in examples)
    read = sum(len(example.ids) - example.prompt_length + 1 for example in examples)
    return 4.0 * (blocks * tokens + lm.readout.weight.numel() * read) / len(batches)


def main() -> None:
    """Measure, compare and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a key of registry in params.yaml")
    parser.add_argument("--steps", type=int, default=8, help="steps a run, each run twice; default: %(default)s")
    parser.add_argument("--members", type=int, default=8, help="seeds that train together; default: %(default)s")
    arguments = parser.parse_args()
    params = load_params()
    settings = params.dual_reward
    lm = load(arguments.model, params.registry)
    examples = examples_of(lm, settings)
    kinds = (0, 1, arguments.members)
    seconds: dict[int, list[float]] = {kind: [] for kind in kinds}
    gap = 0.0
    for _ in range(ROUNDS):
        losses = {}
        for kind in kinds:
            found, losses[kind] = measure(lm, settings, examples, arguments.steps, kind)
            seconds[kind] += [step / (kind or 1) for step in found[1:]]  # the first step warms up
        gaps = [abs(a - b) for kind in kinds[1:] for a, b in zip(losses[0], losses[kind], strict=True)]
        gap = max(gap, *gaps)
    size = settings.batch_size
    batches = [examples[start : start + size] for start in range(0, len(examples) - size + 1, size)]
    operations, limit = needed(lm, batches), float32_limit()
    for kind, name in (
        (1, "dual-reward step, one run"),
        (arguments.members, f"dual-reward step, {arguments.members} runs together, each"),
    ):
        both = {"plain Trainer": seconds[0], "ours": seconds[kind]}
        keep_comparison("training", lm.key, name, compared(both, gap, operations=operations, limit=limit))
    if not gap <= TOLERANCE:
        sys.exit("the losses do not agree: these are not the same training")


if __name__ == "__main__":
    main()
