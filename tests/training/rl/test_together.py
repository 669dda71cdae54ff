"""GRPO of several adapters at once: each is what it is alone; killed groups end as unbroken ones."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.training.adapters import (
    ALONE,
    Adapter,
    Start,
    adapted,
    adapted_together,
    copy_adapter,
    parameters_of,
)
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import QKVO, VO
from classifier_emergence.training.rl import run as grpo
from classifier_emergence.training.rl.rollouts import Draws, draw_completions
from classifier_emergence.training.rl.run import GrpoRun, train_grpo
from classifier_emergence.training.rl.together import UNTRAINED, PolicyMember, kept_starts, train_grpo_together
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask, Sampling

SAMPLING = Sampling(group=3, temperature=0.8, new_tokens=5)
SCHEDULE = Schedule(steps=5, batch_size=3, learning_rate=1e-3, seed=0, every=2)
SHALLOW, DEEP = Adapter(VO, 4, 2.0, (0, 1, 2)), Adapter(QKVO, 2, 4.0, (0, 1, 2, 3))
PLAIN, BOTH = PolicyObjective(0.1), PolicyObjective(0.1, 0.4, 2)
ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
PROMPTS = [
    ("7 * 8 =", "multiply"),
    ("What is 12 times 5?", "multiply"),
    ("17 + 38 =", "add"),
    ("If you subtract 4 from 9, you get", "subtract"),
    ("Find 81 divided by 9", "divide"),
]
TOGETHER: dict[str, tuple[Adapter, PolicyObjective, float | None, bool]] = {
    "plain": (SHALLOW, PLAIN, None, False),
    "both": (SHALLOW, BOTH, None, True),
    "slow": (SHALLOW, BOTH, 2e-4, True),
    "deep": (DEEP, replace(BOTH, class_weight=0.2), None, True),
    "free": (DEEP, PolicyObjective(0.0), 3e-3, False),
    "class_only": (SHALLOW, PolicyObjective(0.1, 1.0, 1), None, False),
}
"""Where the adapter is, what it is trained on, at which rate, and whether it has been trained before."""


@pytest.fixture(autouse=True)
def _completions_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models hardly ever break a line: let a fifth of the vocabulary end completions."""
    monkeypatch.setattr(grpo, "line_ends", lambda tokenizer: list(range(5, len(tokenizer), 5)))
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: None)


def tasks(lm: LanguageModel, first: int, schedule: Schedule = SCHEDULE) -> list[PolicyTask]:
    chosen = [PROMPTS[(first + i) % len(PROMPTS)] for i in range(schedule.steps * schedule.batch_size)]
    return [
        PolicyTask(prompt, "", word_tokens(word, lm.tokenizer).strict_id, back=i % 2)
        for i, (prompt, word) in enumerate(chosen)
    ]


def reward(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Something that a tiny model can be good or bad at."""
    return [float(len(text) % 2) for text in completions]


def shake(wrapped: PeftModel, name: str) -> None:
    """As if it had been trained: a fresh adapter does nothing."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters_of(wrapped, name).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def values(wrapped: PeftModel, name: str) -> dict[str, Tensor]:
    return {full.replace(f".{name}.", "."): p.detach().clone() for full, p in parameters_of(wrapped, name).items()}


class Watch:
    """Measures something that training moves; breaks the run at one of its calls."""

    def __init__(self, lm: LanguageModel, stop: int | None = None) -> None:
        self.lm, self.stop, self.calls = lm, stop, 0

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return {"spread": float(self.lm.model(torch.tensor([self.lm.tokenizer("7 * 8 =")["input_ids"]])).logits.std())}


def run_together(
    lm: LanguageModel, work: Path, names: Sequence[str] = tuple(TOGETHER), *, stop: int | None = None
) -> dict[str, tuple[GrpoRun, dict[str, Tensor]]]:
    chosen = {name: TOGETHER[name] for name in names}
    watch = Watch(lm, stop)
    with adapted_together(lm, {name: Start(place, 7) for name, (place, *_) in chosen.items()}) as wrapped:
        for name, (_, _, _, before) in chosen.items():
            if before:
                shake(wrapped, name)
        members = {
            name: PolicyMember(tasks(lm, i), objective, 10 + i, rate, watch)
            for i, (name, (_, objective, rate, _)) in enumerate(chosen.items())
        }
        found = train_grpo_together(lm, wrapped, members, reward, SAMPLING, SCHEDULE, work=work)
        assert set(wrapped.peft_config) == set(names)
        return {name: (found[name], values(wrapped, name)) for name in names}


@ONE_MODEL
def test_runs_that_train_together_are_those_that_train_alone(lm: LanguageModel, tmp_path: Path) -> None:
    found = run_together(lm, tmp_path / "together")
    for i, (name, (place, objective, rate, before)) in enumerate(TOGETHER.items()):
        with adapted(lm, place, seed=7) as wrapped:
            if before:
                shake(wrapped, ALONE)
            schedule = replace(SCHEDULE, seed=10 + i, learning_rate=rate or SCHEDULE.learning_rate)
            alone = train_grpo(
                lm, wrapped, tasks(lm, i), reward, objective, SAMPLING, schedule, work=tmp_path / name, watch=Watch(lm)
            )
            run, weights = found[name]
            assert len(run.steps) == len(alone.steps)
            pairs: Any = zip([*run.steps, *run.watched], [*alone.steps, *alone.watched], strict=True)
            for ours, theirs in pairs:
                assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4)
            assert run.parameters == alone.parameters
            for full, value in values(wrapped, ALONE).items():
                torch.testing.assert_close(weights[full], value, rtol=1e-2, atol=5e-4)
    assert len({step["reward"] for step in found["plain"][0].steps}) > 1


@ONE_MODEL
def test_what_is_drawn_for_one_run_does_not_depend_on_the_others(lm: LanguageModel) -> None:
    encoded = lm.tokenizer([prompt for prompt, _ in PROMPTS])["input_ids"]
    asked = {"first": (encoded[:3], [0, 1, 1, 2]), "second": (encoded[3:], [0, 0, 1]), "third": (encoded[:1], [0])}
    how: dict[str, Any] = {"new_tokens": 6, "temperature": 1.0, "stop": range(4, len(lm.tokenizer), 4)}

    def draws(name: str) -> Draws:
        return Draws(*asked[name], torch.Generator().manual_seed(len(name)), name)

    with adapted_together(lm, {name: Start(DEEP, i) for i, name in enumerate(asked)}) as wrapped:
        for name in ("first", "second"):
            shake(wrapped, name)
        found = draw_completions(lm, [draws(name) for name in asked], wrapped=wrapped, **how)
        for name, texts in zip(asked, found, strict=True):
            wrapped.set_adapter(name)
            assert draw_completions(lm, [draws(name)], **how)[0] == texts
    assert len({len(text) for texts in found for text in texts}) > 1


@ONE_MODEL
def test_killed_runs_that_train_together_end_as_unbroken_ones(lm: LanguageModel, tmp_path: Path) -> None:
    names = ["both", "free", "class_only"]
    whole = run_together(lm, tmp_path / "whole", names)
    with pytest.raises(KeyboardInterrupt):
        run_together(lm, tmp_path / "broken", names, stop=7)  # at step 4
    for again in (run_together(lm, tmp_path / "broken", names), run_together(lm, tmp_path / "broken", names)):
        for name in names:  # gone on with, then only read
            assert again[name][0] == whole[name][0]
            for full, value in whole[name][1].items():
                assert torch.equal(again[name][1][full], value)


@ONE_MODEL
def test_runs_that_start_alike_share_the_pass_of_their_reference(lm: LanguageModel) -> None:
    names = ["fresh", "idle", "one", "copy", "other", "free"]
    with adapted_together(lm, {name: Start(SHALLOW, i) for i, name in enumerate(names)}) as wrapped:
        for name in ("one", "other"):
            shake(wrapped, name)
        copy_adapter(wrapped, "one", ["copy"])
        members = {name: PolicyMember([], PLAIN, 0) for name in names[:-1]}
        with kept_starts(wrapped, {**members, "free": PolicyMember([], PolicyObjective(0.0), 0)}) as starts:
            assert starts == {
                UNTRAINED: ["fresh", "idle"], "start_of_one": ["one", "copy"], "start_of_other": ["other"]
            }  # fmt: skip
            trained = {full for full, p in wrapped.named_parameters() if p.requires_grad}
            assert trained == {full for name in names for full in parameters_of(wrapped, name)}
        assert set(wrapped.peft_config) == set(names)


@ONE_MODEL
def test_runs_on_the_lens_alone_draw_nothing_and_stop_at_its_layer(lm: LanguageModel, tmp_path: Path) -> None:
    ran: set[int] = set()
    handles = [block.register_forward_hook(lambda *_, i=i: ran.add(i)) for i, block in enumerate(lm.blocks)]

    def never(*_: Any) -> list[float]:
        raise AssertionError

    rates = {"one": None, "two": 0.0}
    with adapted_together(lm, {name: Start(SHALLOW, 0) for name in rates}) as wrapped:
        objective = PolicyObjective(0.1, 1.0, 1)
        members = {name: PolicyMember(tasks(lm, 0), objective, 0, rate) for name, rate in rates.items()}
        found = train_grpo_together(lm, wrapped, members, never, SAMPLING, SCHEDULE, work=tmp_path)
        moved = {name: any(p.any() for n, p in values(wrapped, name).items() if "lora_B" in n) for name in rates}
    assert moved == {"one": True, "two": False}  # a rate of zero is one, too
    for handle in handles:
        handle.remove()
    assert ran == {0, 1}
    assert all(set(step) == {"step", "loss", "class_loss"} for step in found["one"].steps)


@ONE_MODEL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "tasks: 0 given, 5 steps of 3 take 15"),
        ({"objective": replace(PLAIN, signed_kl=True)}, "objective of one: signed_kl"),
        ({"objective": replace(BOTH, layer=99)}, "layer: 99"),
        ({"learning_rate": 1e20}, r"loss of one at step|logits are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(lm: LanguageModel, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    member = replace(PolicyMember(tasks(lm, 0), PLAIN, 0), **change)
    with pytest.raises(InputError, match=message), adapted_together(lm, {"one": Start(SHALLOW, 0)}) as wrapped:
        train_grpo_together(lm, wrapped, {"one": member}, reward, SAMPLING, SCHEDULE, work=tmp_path)
