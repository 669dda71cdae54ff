"""An iteration of GRPO against ``trl.GRPOTrainer`` left at its defaults.

``python -m benchmarks.grpo smollm2-135m-instruct [--steps N] [--members M]`` trains the whole model with both, from the
same weights on the same prompts, in turns, and keeps the seconds of an iteration (draw, reward, loss, gradient,
optimiser) in results/benchmarks/grpo.json. With members it trains adapters on V and O instead, as many together, each
on prompts of its own, and one of them alone; the peer trains the first of them, and seconds are those of an iteration
of one member.

What defines the task is the same for all: prompts, group, length and ends of completions, temperature, learning rate,
weight of the divergence, random numbers. The rest of the peer is as it comes: bfloat16 autocast and activations that
are computed again for the gradient. The same peer in float32 stands beside it; it draws the very same completions,
which is checked: what outputs differ by is the share of completions that are not the same. Where the processor would
emulate bfloat16, it stands there alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.recorded import compared, has_bfloat16, keep_comparison
from benchmarks.training import Clock
from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.tasks.problems import sample, split
from classifier_emergence.training.adapters import Adapter, Start, adapted, adapted_together
from classifier_emergence.training.group_trainer import Schedule, group_arguments
from classifier_emergence.training.modules import VO
from classifier_emergence.training.rl import run as grpo
from classifier_emergence.training.rl import trainer as grpo_trainer
from classifier_emergence.training.rl.rewards import Reward, exact, parse_answer
from classifier_emergence.training.rl.rollouts import generator_of
from classifier_emergence.training.rl.run import all_weights_trainable
from classifier_emergence.training.rl.together import PolicyMember, PolicyTrainer, kept_starts
from classifier_emergence.training.rl.trainer import GrpoWithLens, PolicyObjective, PolicyTask, Sampling
from experiments.params import load_params

ROUNDS = 2


class Peer(GRPOTrainer):  # type: ignore[misc]
    """Draws with the random numbers that ours have at the step."""

    def _generate(self, prompts: list[Any]) -> Any:
        torch.manual_seed(generator_of(self.args.seed, self.state.global_step, torch.device("cpu")).initial_seed())
        return super()._generate(prompts)


@contextmanager
def trained(lm: LanguageModel, place: Adapter | None, members: int) -> Iterator[Any]:
    """The model as it is trained: whole, with an adapter, or with several."""
    if place is None:
        opened: Any = all_weights_trainable(lm)
    elif members:
        opened = adapted_together(lm, {str(i): Start(place, i) for i in range(members)})
    else:
        opened = adapted(lm, place, seed=0)
    with opened as model, grpo.borrowed(lm, model):
        yield model


def trainer_of(
    lm: LanguageModel, model: Any, tasks: Sequence[list[PolicyTask]], reward: Reward, sampling: Sampling,
    schedule: Schedule, kl_weight: float, kind: str, work: str,
) -> Any:  # fmt: skip
    """One of the trainers that are compared."""
    objective = PolicyObjective(kl_weight)
    if kind == "ours":
        settings = grpo_trainer.arguments(objective, sampling, schedule, Path(work))
        return GrpoWithLens(lm, model, settings, tasks[0], reward, objective)
    if kind == "together":
        members = {str(i): PolicyMember(own, objective, i) for i, own in enumerate(tasks)}
        settings = group_arguments(model, members, schedule, Path(work), logging_steps=1, save_steps=schedule.every)
        with kept_starts(model, members) as starts:  # all are fresh: no adapter is kept
            return PolicyTrainer(lm, model, settings, members, reward, sampling, schedule, starts)
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
    return Peer(
        model,
        lambda prompts, completions, answer, **_: reward(prompts, completions, answer),
        settings,
        Dataset.from_list([asdict(task) for task in tasks[0]]),
        processing_class=lm.tokenizer,
    )


def measure(
    lm: LanguageModel, place: Adapter | None, tasks: Sequence[list[PolicyTask]], sampling: Sampling,
    schedule: Schedule, kl_weight: float, kind: str,
) -> tuple[list[float], list[str]]:  # fmt: skip
    """Seconds of every iteration, of one member, of a fresh run; and the completions of the first."""
    drawn: list[str] = []

    def reward(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        drawn.extend(completions)
        return exact(parse_answer)(prompts, completions, answers)

    members = len(tasks) if kind == "together" else 0
    with tempfile.TemporaryDirectory() as work, trained(lm, place, members) as model:
        trainer = trainer_of(lm, model, tasks, reward, sampling, schedule, kl_weight, kind, work)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock := Clock())
        trainer.train()
    return [seconds / (members or 1) for seconds in clock.seconds], drawn[: schedule.batch_size * sampling.group]


def main() -> None:
    """Measure, compare and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a key of registry in params.yaml")
    parser.add_argument("--steps", type=int, default=5, help="iterations a run, each run twice; default: %(default)s")
    parser.add_argument("--members", type=int, default=0, help="adapters that train together; default: the whole model")
    arguments = parser.parse_args()
    params = load_params("params.yaml")
    settings, adapter = params.grpo, params.collapse
    lm = load(arguments.model, params.registry)
    problems = split(settings.operands, dict.fromkeys(settings.operands, settings.test_problems), seed=0)
    shots = "".join(f"{line}\n" for line in settings.shots)
    n = arguments.steps * settings.prompts
    tasks = [
        [PolicyTask(shots + p.symbol, p.answer, 0) for p in sample(problems.train, n, seed=seed)]
        for seed in range(arguments.members or 1)
    ]
    place = Adapter(VO, adapter.rank, adapter.scale, tuple(range(layer_at(settings.depth, lm.n_layers))))
    rate = adapter.vo_learning_rate if arguments.members else settings.learning_rate
    sampling = Sampling(settings.group, settings.temperature, settings.new_tokens)
    schedule = Schedule(arguments.steps, settings.prompts, rate, 0, arguments.steps + 1)
    peers = ["defaults", "float32"] if has_bfloat16() else ["float32"]
    kinds = [*peers, "ours", *(["together"] if arguments.members else [])]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    completions: dict[str, list[str]] = {}
    for _ in range(ROUNDS):
        for kind, found in seconds.items():
            times, completions[kind] = measure(
                lm, place if arguments.members else None, tasks, sampling, schedule, settings.kl_weight, kind
            )
            found += times[1:]  # the first iteration warms up
    what = f"GRPO on {arguments.members} adapters, each" if arguments.members else "GRPO on the whole model"
    theirs = {f"TRL, {kind}": seconds[kind] for kind in peers}
    for kind in kinds[len(peers) :]:
        apart = [a != b for a, b in zip(completions["float32"], completions[kind], strict=True)]
        gap = sum(apart) / len(apart)
        if kind == kinds[-1]:  # one adapter alone is there to see that it draws the same
            keep_comparison("grpo", lm.key, what, compared(theirs | {"ours": seconds[kind]}, gap))
        if gap > 0.1:
            sys.exit("the completions differ: this is not the same work")


if __name__ == "__main__":
    main()
