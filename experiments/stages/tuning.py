"""Stage tuning@model: does instruction tuning change what probes find, and does it make dual reward harder?

A base model is made to follow instructions by low-rank updates of every linear map, on conversations that a larger
model wrote (stage conversations), over seeds. The control sees the same conversations with the words of every request
and reply in another order. Whether a model follows is tested on things that no conversation was about. Then base, tuned
and control models are probed, and trained by dual reward with the same budget.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from classifier_emergence.reading.layers import row_at
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import fit_probes
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.results import read_result
from classifier_emergence.tasks.arithmetic import OPERATIONS, prompt_bank
from classifier_emergence.tasks.splits import rotations
from classifier_emergence.training.adapters import Start, adapted_together, save_adapter
from classifier_emergence.training.examples import Example, Objective
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import MLP, QKVO
from classifier_emergence.training.supervised import Member, train_together
from experiments.params import Params
from experiments.shared.conversations import replies, requests
from experiments.shared.dual_reward import DualRewardArm, DualRewardStudy, measure_arm
from experiments.shared.model import build
from experiments.shared.probing import TOLERANCE
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main, result_path
from experiments.shared.study import adapter_of
from experiments.shared.summaries import accuracy_curve, over, over_seeds, paired, share_of

KINDS = ("tuned", "control")
PROBED = {"symbol": "pair", "word": "template"}
"""Style of the bank -> what its probes are tested on and never fitted on."""
DEPTH = 0.25  # of the originals' largest difference between a base and an instruct model: L10 of 40


def run(params: Params, key: str) -> None:
    """Tune, then measure every model; write one result."""
    settings = params.tuning
    with Runs("tuning", key, params, build, "conversations", "dual_reward", "bank", "probing") as runs:
        written = read_result(result_path("conversations", settings.teacher))["train"]["replies"]
        members = {f"{kind}-{seed}": (kind, seed) for kind in KINDS for seed in settings.seeds}
        trained = runs.all([Run("tune", tune, (written, members, params, runs.adapters), tuple(members))])
        calls = [Run("base", measure, (None, settings.seeds, params))]
        calls += [
            Run(f"{name}-measured", measure, (runs.adapters / name, [seed], params))
            for name, (_, seed) in members.items()
        ]
        measured = runs.all(calls)
        models = {
            "base": [measured["base"]],
            **{kind: [measured[f"{kind}-{seed}-measured"] for seed in settings.seeds] for kind in KINDS},
        }
        lm = runs.study
        result = {
            "model": key,
            "teacher": settings.teacher,
            "conversations": len(written),
            "layers": lm.layers,
            "probed_at": lm.layers[row_at(DEPTH, lm.n_layers)],
            "steps": {"tuning": settings.steps, "dual_reward": params.dual_reward.arm_steps},
            "losses": {name: found["losses"] for name, found in trained.items()},
            "models": {name: summary(found) for name, found in models.items()},
            "tuned_minus_base": contrasts(lm, models["tuned"], models["base"], params),
            "tuned_minus_control": contrasts(lm, models["tuned"], models["control"], params),
        }
        runs.finish(result)


def tune(
    lm: LanguageModel,
    work: Path,
    wanted: Sequence[str],
    written: Sequence[Mapping[str, str]],
    members: Mapping[str, tuple[str, int]],
    params: Params,
    adapters: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All seeds of both kinds, together."""
    settings = params.tuning
    adapter = adapter_of(settings, lm.n_layers, (*QKVO, *MLP))
    schedule = Schedule(settings.steps, settings.batch_size, settings.learning_rate, 0, settings.every)
    with adapted_together(lm, {name: Start(adapter, seed) for name, (_, seed) in members.items()}) as wrapped:
        data = {
            name: Member(examples(lm, written, params, seed if kind == "control" else None), Objective(0.0), seed)
            for name, (kind, seed) in members.items()
        }
        text = f"tuning of {lm.key}: {len(members)} runs"
        trained = train_together(lm, wrapped, data, schedule, work=work, description=text)
        for name in wanted:
            save_adapter(wrapped, name, adapters / name)
            yield name, {"losses": trained[name].losses}


def examples(
    lm: LanguageModel, written: Sequence[Mapping[str, str]], params: Params, shuffled: int | None
) -> list[Example]:
    """Requests and replies as texts to train on; the loss is on the reply and the end of text after it.

    ``shuffled`` is the seed of the order of words, None where they stay as they are.
    """
    random, texts = np.random.default_rng(shuffled), []
    for pair in written:
        request, reply = (
            pair[part] if shuffled is None else " ".join(random.permutation(pair[part].split()))
            for part in ("request", "reply")
        )
        prompt: list[int] = lm.tokenizer(params.tuning.chat.format(request=request))["input_ids"]
        answer: list[int] = lm.tokenizer(reply, add_special_tokens=False)["input_ids"]
        texts.append(Example([*prompt, *answer, int(lm.tokenizer.eos_token_id)], len(prompt), 0))
    return texts


# --- Measures ---


def measure(
    lm: LanguageModel, work: Path, adapter: Path | None, seeds: Sequence[int], params: Params
) -> dict[str, Any]:
    """Whether a model follows requests, what probes find in it, and what dual reward makes of it."""
    model = lm if adapter is None else merged(lm, adapter)
    return {
        "follows": follows(model, params),
        "probes": probed(model, params),
        "rewards": reward(model, work, seeds, params),
    }


def merged(lm: LanguageModel, adapter: Path) -> LanguageModel:
    """A copy of the model with an adapter merged."""
    model: Any = PeftModel.from_pretrained(copy.deepcopy(lm.model), str(adapter)).merge_and_unload()
    return replace(lm, model=model.requires_grad_(False).eval())


def follows(lm: LanguageModel, params: Params) -> dict[str, Any]:
    """Replies to requests about things that no conversation was about: do they end, and are they what was asked for?"""
    asked = requests(held_out=True)
    prompts = [params.tuning.chat.format(request=request.text) for request in asked]
    texts, ended = replies(lm, prompts, new_tokens=params.conversations.new_tokens)
    right = [end and request.answered_by(text) for request, text, end in zip(asked, texts, ended, strict=True)]
    things = [request.thing for request in asked]
    return {
        "ended": share_of(ended, params.confidence, clusters=things),
        "right": share_of(right, params.confidence, clusters=things),
        "replies": [
            {"request": request.text, "reply": text} for request, text in zip(asked[:8], texts[:8], strict=True)
        ],
    }


def probed(lm: LanguageModel, params: Params) -> dict[str, Any]:
    """Standardised probes of the operation at every layer, on held-out operands of symbols and templates of words."""
    found: dict[str, Any] = {}
    row = row_at(DEPTH, lm.n_layers)
    for style in PROBED:
        bank = prompt_bank(style, params.bank)
        y, groups = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in bank]), groups_of(style, params)
        states = residual_stream(lm, [p.text for p in bank], description=f"{lm.key}: {len(bank)} {style} prompts")
        correct = torch.zeros(states.shape[:2], dtype=torch.bool)
        for split in rotations(groups, params.probing.folds, seed=params.probing.seed):
            fit, test = torch.from_numpy(split.train), torch.from_numpy(split.test)
            probes = fit_probes(states[:, fit], y[fit], C=params.probing.C, standardise=True, tol=TOLERANCE)
            correct[:, test] = probes.predict(states[:, test]) == y[test]
        found[style] = {
            **accuracy_curve(correct, params.confidence, clusters=groups),
            "at_depth": share_of(correct[row], params.confidence, clusters=groups),
            "correct": correct,
        }
    return found


def groups_of(style: str, params: Params) -> list[str]:
    """What each prompt of the bank shares with those that are held out with it."""
    return [str(getattr(prompt, PROBED[style])) for prompt in prompt_bank(style, params.bank)]


def reward(lm: LanguageModel, work: Path, seeds: Sequence[int], params: Params) -> list[dict[str, Any]]:
    """Dual reward as in the main arm of stage dual_reward, for as many steps as its other arms; all seeds together."""
    study, arm, settings = DualRewardStudy(params, lm.key, lm), DualRewardArm(), params.dual_reward
    before, names = study.read(study.prompts(), [study.row]).own_word[0], {f"seed-{seed}": seed for seed in seeds}
    schedule = Schedule(settings.arm_steps, settings.batch_size, settings.learning_rate, 0, params.tuning.reward_every)
    found = []
    with adapted_together(lm, {name: Start(study.adapter(arm), seed) for name, seed in names.items()}) as wrapped:
        members = {name: study.member(arm, seed) for name, seed in names.items()}
        text = f"dual reward of {lm.key}: {len(seeds)} runs"
        trained = train_together(lm, wrapped, members, schedule, work=work, description=text)
        for name in names:
            wrapped.set_adapter(name)
            measured = measure_arm(study, wrapped, study.layer, study.words)
            passed = [e["step"] for e in trained[name].watched if e["alignment"] >= settings.threshold]
            found.append({
                "class_loss_before": study.mean(-before.log(), study.units()),
                "watched": trained[name].watched,
                # One more than there were, where it was not reached.
                "steps_to_half": passed[0] if passed else settings.arm_steps + 1,
                **{part: measured[part] for part in ("symbol", "word", "answers", "kl")},
                "items": {
                    "class_loss": -before.log(),
                    "alignment": study.read(study.prompts(), [study.row]).own_word[0],
                    "log_prob": measured["items"]["log_prob"],
                    "units": study.units(),
                },
            })  # fmt: skip
    return found


# --- Summaries ---


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of a model, over seeds."""
    rewards = rewards_of(found)
    numbers = ("class_loss_before", "symbol.alignment", "symbol.top", "word.top", "answers.exact", "answers.log_prob",
               "kl")  # fmt: skip
    return {
        "follows": {name: over_seeds(found, f"follows.{name}") for name in ("ended", "right")},
        "replies": found[0]["follows"]["replies"],
        "probes": {
            style: {
                **{name: [one["probes"][style][name] for one in found] for name in ("accuracy", "interval")},
                "at_depth": over_seeds(found, f"probes.{style}.at_depth"),
            }
            for style in PROBED
        },
        "reward": {
            "watched": [one["watched"] for one in rewards],
            "steps_to_half": over([one["steps_to_half"] for one in rewards]),
            **{name.replace(".", "_"): over_seeds(rewards, name) for name in numbers},
        },
    }


def rewards_of(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What dual reward made, by seed: of one base model with all of them, or of models of a seed each."""
    return [reward for one in found for reward in one["rewards"]]


def contrasts(
    lm: LanguageModel, after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], params: Params
) -> dict[str, Any]:
    """One model minus another, seed by seed: probes at ``DEPTH``, prompt by prompt, and dual reward, by problem."""
    row = row_at(DEPTH, lm.n_layers)
    others = before if len(before) > 1 else [*before] * len(after)
    found: dict[str, Any] = {
        "probes": {
            style: over([
                paired(a["probes"][style]["correct"][row], b["probes"][style]["correct"][row], params.confidence,
                       groups_of(style, params))
                for a, b in zip(after, others, strict=True)
            ])
            for style in PROBED
        }
    }  # fmt: skip
    pairs = list(zip(rewards_of(after), rewards_of(before), strict=True))
    for item in ("class_loss", "alignment", "log_prob"):
        found[item] = over([
            paired(a["items"][item], b["items"][item], params.confidence, a["items"]["units"]) for a, b in pairs
        ])  # fmt: skip
    found["steps_to_half"] = over([a["steps_to_half"] - b["steps_to_half"] for a, b in pairs])
    return found


if __name__ == "__main__":
    main(run, __doc__)
