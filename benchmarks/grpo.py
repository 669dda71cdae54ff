"""An iteration of GRPO against ``trl.GRPOTrainer`` left at its defaults.

``python -m benchmarks.grpo smollm2-135m-instruct [--steps N]`` trains the whole model with both, from the same weights
on the same prompts, in turns, and prints the median seconds of an iteration (draw, reward, loss, gradient, optimiser)
and their ratio. What defines the task is the same for both: prompts, group, length and ends of completions,
temperature, learning rate, weight of the divergence, seed. The rest of the peer is as it comes: bfloat16 autocast and
activations that are computed again for the gradient. The same peer in float32 stands beside it; it draws the very
same completions, which is checked.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.training import Clock
from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.tasks.problems import sample, split
from classifier_emergence.training.rl import run as grpo
from classifier_emergence.training.rl import trainer as grpo_trainer
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.run import all_weights_trainable
from classifier_emergence.training.rl.trainer import GrpoWithLens, PolicyObjective, PolicyTask, Sampling
from classifier_emergence.training.supervised import Schedule
from experiments.params import load_params

ROUNDS = 2


def measure(
    lm: LanguageModel, tasks: list[PolicyTask], sampling: Sampling, schedule: Schedule, kl_weight: float, kind: str
) -> tuple[list[float], list[str]]:
    """Seconds of every iteration of a fresh run, and the completions of the first."""
    drawn: list[str] = []

    def reward(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        drawn.extend(completions)
        return exact(parse_answer)(prompts, completions, answers)

    with tempfile.TemporaryDirectory() as work, all_weights_trainable(lm) as model, grpo.borrowed(lm, model):
        dataset = Dataset.from_list([asdict(task) for task in tasks])
        if kind == "ours":
            objective = PolicyObjective(kl_weight)
            settings = grpo_trainer.arguments(objective, sampling, schedule, Path(work))
            trainer: Any = GrpoWithLens(lm, model, settings, tasks, reward, objective)
        else:
            settings = GRPOConfig(
                output_dir=work,
                per_device_train_batch_size=schedule.batch_size * sampling.group,
                num_generations=sampling.group,
                max_completion_length=sampling.new_tokens,
                temperature=sampling.temperature,
                max_steps=schedule.steps,
                learning_rate=schedule.learning_rate,
                beta=kl_weight,
                seed=schedule.seed,
                shuffle_dataset=False,
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
                report_to="none",
                **({"bf16": False} if kind == "float32" else {}),
            )
            trainer = GRPOTrainer(
                model,
                lambda prompts, completions, answer, **_: reward(prompts, completions, answer),
                settings,
                dataset,
                processing_class=lm.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock := Clock())
        trainer.train()
    return clock.seconds, drawn[: schedule.batch_size * sampling.group]


def main() -> None:
    """Measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    params = load_params("params.yaml")
    settings = params.grpo
    lm = load(arguments.model, params.registry)
    problems = split(settings.operands, dict.fromkeys(settings.operands, settings.test_problems), seed=0)
    shots = "".join(f"{line}\n" for line in settings.shots)
    n = arguments.steps * settings.prompts
    tasks = [PolicyTask(shots + p.symbol, p.answer, 0) for p in sample(problems.train, n, seed=0)]
    sampling = Sampling(settings.group, settings.temperature, settings.new_tokens)
    schedule = Schedule(arguments.steps, settings.prompts, settings.learning_rate, 0, arguments.steps + 1)
    seconds: dict[str, list[float]] = {"defaults": [], "float32": [], "ours": []}
    completions: dict[str, list[str]] = {}
    for _ in range(ROUNDS):
        for kind, found in seconds.items():
            times, completions[kind] = measure(lm, tasks, sampling, schedule, settings.kl_weight, kind)
            found += times[1:]  # the first iteration warms up
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    same = sum(a == b for a, b in zip(completions["float32"], completions["ours"], strict=True))
    print(f"{lm.key}: {settings.prompts} prompts, {settings.group} completions each; median seconds an iteration")
    for kind, value in median.items():
        print(f"  {kind:9} {value:7.3f}  ratio {value / median['ours']:5.2f}")
    print(f"  the same completions as in float32: {same} of {len(completions['ours'])}")
    if same < 0.9 * len(completions["ours"]):
        sys.exit("the completions differ: this is not the same work")


if __name__ == "__main__":
    main()
