"""``trl.GRPOTrainer`` with a loss that reads the logit lens at a middle layer.

``loss = (1 - w) * GRPO + w * CE(lens at layer L, word)``, the lens read at the last token of the prompt. The policy
term, its divergence from the reference and its statistics are those of ``trl.GRPOTrainer``; w = 0 is that trainer.

Source: GRPO, Shao et al. (2024), arXiv:2402.03300; the divergence k3, Schulman (2020), Approximating KL divergence.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import outputs_of, stopping_after
from classifier_emergence.reading.tree import Tree, last_states, one_pass, takes_trees
from classifier_emergence.training.examples import check_class_weight
from classifier_emergence.training.group_trainer import Schedule, common_arguments
from classifier_emergence.training.rl.rewards import Reward, checked
from classifier_emergence.training.rl.rollouts import (
    Draws,
    base_of,
    draw_completions,
    generator_of,
    live_readout,
    sequence_log_probs,
    token_log_probs,
    unpadded,
)
from classifier_emergence.training.run_folder import ProgressBar, WatchingTrainer


@dataclass(frozen=True)
class PolicyTask:
    """A prompt to answer, and the class that the lens should name at its end or before."""

    prompt: str
    answer: str
    target: int
    """Token id of the class's word."""
    back: int = 0
    """How many tokens before the prompt's last one the lens should name it."""


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised; see the top of this module."""

    kl_weight: float
    """beta: weight of the mean k3 divergence from the model at the start, a token. 0 keeps no reference."""
    class_weight: float = 0.0
    """w, within [0, 1]."""
    layer: int | None = None
    """0-based block after which the lens reads; may be None if w is 0."""
    signed_kl: bool = False
    """A flaw of the originals: in place of k3 add ``log pi - log pi_ref``, summed over prompt and response. It has a
    sign and, on prompts, which the policy did not draw, no lower bound: minimising it lowers their probability. With
    an adapter ``pi_ref`` is the model without it."""
    entropy_bonus: float = 0.0
    """Subtract so much of the entropy of the batch's mean lens distribution from the loss on the lens."""

    @property
    def draws(self) -> bool:
        """Whether completions enter the loss; if not, none are drawn and the model runs as far as the lens reads."""
        return self.class_weight < 1

    def __post_init__(self) -> None:
        check_class_weight(self.class_weight, self.layer)
        if self.kl_weight < 0:
            raise InputError(f"kl_weight: {self.kl_weight} is negative; pass 0 or more")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    group: int
    """Completions of each prompt; advantages are relative to their mean."""
    temperature: float
    new_tokens: int
    """Completions end here if no line break or end of text came before."""


def arguments(
    objective: PolicyObjective, sampling: Sampling, schedule: Schedule, work: Path, checkpoint_every: int | None = None
) -> GRPOConfig:
    """Every setting of the trainer that matters, none left at a default that a release may change."""
    return GRPOConfig(
        **common_arguments(schedule, work),
        # One update for each draw of completions: the policy that is trained is the one that drew them, its ratio to
        # itself is 1, and no pass is needed for old log-probabilities.
        per_device_train_batch_size=schedule.batch_size * sampling.group,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=sampling.group,
        per_device_eval_batch_size=sampling.group,
        shuffle_dataset=False,
        # Loss.
        beta=0.0 if objective.signed_kl else objective.kl_weight,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        importance_sampling_level="token",
        mask_truncated_completions=False,
        entropy_coef=0.0,
        disable_dropout=True,
        # Sampling.
        use_vllm=False,
        max_completion_length=sampling.new_tokens,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        # Optimiser and arithmetic.
        optim="adamw_torch_fused",
        activation_checkpointing=False,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        # Log and checkpoints.
        logging_steps=1,
        eval_strategy="steps",
        save_steps=checkpoint_every or schedule.every,
    )


class UnsavedEnd(ProgressBar):
    """No checkpoint of the last step: from that, Trainer would take one step more."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on."""
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= state.max_steps:
            control.should_save = False


class GrpoWithLens(WatchingTrainer, GRPOTrainer):  # type: ignore[misc]
    """``trl.GRPOTrainer`` with a loss on the lens; sends nothing to anyone."""

    share_prompts = True
    """Whether what texts begin with passes once for all of them; else everything is left to ``GRPOTrainer``."""
    shown: ClassVar[dict[str, str]] = {"reward": "reward", "kl": "kl", "class_loss": "class_loss"}
    bar: ClassVar[type[ProgressBar]] = UnsavedEnd
    kept: ClassVar[int] = 1  # of a whole model it is three times as large

    def __init__(
        self,
        lm: LanguageModel,
        model: PreTrainedModel | PeftModel,
        arguments: GRPOConfig,
        tasks: Sequence[PolicyTask],
        reward: Reward,
        objective: PolicyObjective,
        watch: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.objective = objective
        self.watch = watch
        self.parts = {}
        self.passed: tuple[Tree, Tensor] | None = None
        """The texts of this step and their states, once the policy's loss has passed them as a tree."""
        self.lm = lm
        self.block = None if objective.layer is None else lm.blocks[objective.layer]
        self.reference: LanguageModel | None = None
        if objective.signed_kl and model is lm.model:
            self.reference = replace(lm, model=copy.deepcopy(lm.model).requires_grad_(False))
        guarded = checked(reward)

        def answer_reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
            return list(guarded(prompts, completions, answer))

        texts: list[list[int]] = lm.tokenizer([task.prompt for task in tasks])["input_ids"]
        longest = max(map(len, texts)) + arguments.max_completion_length
        self.share_prompts = self.share_prompts and takes_trees(lm.model, longest)
        dataset = Dataset.from_list([asdict(task) for task in tasks])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)  # the version is pinned
            super().__init__(
                model=model,
                reward_funcs=answer_reward,
                args=arguments,
                train_dataset=dataset,
                eval_dataset=dataset.select([0]),  # Trainer asks for one; ``evaluate`` below does not look at it
                processing_class=lm.tokenizer,
                rollout_func=self._rollout if self.share_prompts else None,
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch; see ``PolicyObjective``."""
        objective, weight = self.objective, self.objective.class_weight
        self.passed = None
        loss = torch.zeros((), device=inputs["target"].device)
        with outputs_of(self.block if weight else None) as outputs:
            if objective.draws:
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            else:
                assert self.block is not None
                passing, paths = one_pass(unpadded(inputs["prompt_ids"], inputs["prompt_mask"]), self.lm.model)
                with stopping_after(self.block):
                    self.lm.model.get_decoder()(**passing, use_cache=False)
        if objective.signed_kl:
            loss = loss + objective.kl_weight * self._signed_kl(inputs)
        if weight:
            if objective.draws:
                states = self._read(outputs[0], inputs)
            else:
                back = inputs["back"].tolist()
                states = outputs[0].flatten(0, 1)[[path[-1 - n] for path, n in zip(paths, back, strict=True)]]
            class_loss = self._class_loss(states, inputs["target"])
            self.parts["class_loss"] = [class_loss.item()]
            loss = (1 - weight) * loss + weight * class_loss
        if not loss.isfinite():
            raise InputError(
                f"learning_rate: the loss at step {self.state.global_step + 1} is not finite (learning rate "
                f"{self.args.learning_rate:g}); choose a smaller one and run again"
            )
        return loss

    def _read(self, states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(rows, d) states at the token of every prompt that the lens reads, from the pass of the policy's loss."""
        if self.passed is None:  # left padding ends all prompts at one position
            return states[torch.arange(len(states)), inputs["prompt_ids"].shape[1] - 1 - inputs["back"]]
        at = (inputs["prompt_mask"].sum(-1) - 1 - inputs["back"]).tolist()
        return states[0, [path[n] for path, n in zip(self.passed[0].paths, at, strict=True)]]

    def _class_loss(self, states: Tensor, target: Tensor) -> Tensor:
        readout = live_readout(self.lm)
        normed = readout.norm(states)
        loss = -token_log_probs(normed, readout, target)[0].mean()
        if self.objective.entropy_bonus:
            mean = readout.unembed(normed).float().softmax(-1).mean(0)
            loss = loss + self.objective.entropy_bonus * torch.special.xlogy(mean, mean).sum()
        return loss

    def _signed_kl(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mean of the originals' term over sequences; logs it, and k3 on the responses beside it."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        policy = sequence_log_probs(self.lm, ids, mask, self.passed)
        adapter_off = self.model.disable_adapter() if self.reference is None else nullcontext()
        with torch.no_grad(), adapter_off:
            reference = sequence_log_probs(self.reference or self.lm, ids, mask)
        signed = (policy - reference).sum(-1).mean()
        width = inputs["completion_ids"].shape[1]
        gap = (reference - policy).detach()[:, -width:]
        self.parts["signed_kl"] = [signed.item()]
        self.parts["kl"] = [float((gap.exp() - gap - 1).sum() / inputs["completion_mask"].sum())]
        return signed

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """What the lens reads travels with prompts and completions through whatever order the trainer makes."""
        target, back = (
            torch.tensor([t[name] for t in inputs], device=self.accelerator.device) for name in ("target", "back")
        )
        if not self.objective.draws:
            prompts = [task["prompt"] for task in inputs]
            read = self.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
            ids, mask = (read[name].to(target.device) for name in ("input_ids", "attention_mask"))
            return {"prompt_ids": ids, "prompt_mask": mask, "target": target, "back": back}
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return {**batch, "target": target, "back": back}

    def _rollout(self, prompts: list[str], _: Any) -> dict[str, Any]:
        distinct = list(dict.fromkeys(prompts))
        encoded: list[list[int]] = self.processing_class(distinct)["input_ids"]
        rows = [distinct.index(prompt) for prompt in prompts]
        completions = draw_completions(
            self.lm,
            [Draws(encoded, rows, generator_of(self.args.seed, self.state.global_step, self.lm.model.device))],
            new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            stop=self.eos_token_ids,
        )[0]
        return {"prompt_ids": [encoded[row] for row in rows], "completion_ids": completions, "logprobs": None}

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same numbers as the method that it overrides, from fewer tokens."""
        tree = Tree(unpadded(input_ids, attention_mask))
        # Of the policy, or of the reference that the trainer keeps.
        lm, start = replace(self.lm, model=base_of(model)), input_ids.shape[1] - logits_to_keep
        if not (self.share_prompts and tree.fits(lm.model)):
            return super()._get_per_token_logps_and_entropies(  # type: ignore[no-any-return]
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        asked = attention_mask[:, start:] == 1
        lengths = attention_mask[:, :start].sum(-1).tolist()
        # A token is predicted at the node before it.
        nodes = [node for path, length in zip(tree.paths, lengths, strict=True) for node in path[length - 1 : -1]]
        states = last_states(tree.inputs(lm.model), lm.model)
        if states.requires_grad:
            self.passed = tree, states
        tokens = input_ids[:, start:][asked]
        scores = token_log_probs(states[nodes], live_readout(lm), tokens, temperature=self.temperature)
        log_probs, entropy = (torch.zeros(asked.shape, device=x.device).masked_scatter(asked, x) for x in scores)
        return log_probs, entropy, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints are scratch."""

    def _send_telemetry(self) -> None:
        """Training here is nobody's business."""
