"""A dense model made into a mixture of experts by branch-train-mix, and its dense twin.

Copies of the dense model's MLPs are trained apart on different texts (low-rank updates, merged afterwards), then joined
under a fresh router in the blocks that they change, as a model of the Mixtral class: Mixtral is Llama with experts for
MLPs. Then routers and norm gains are trained together with the language-modelling loss and load balancing, so the
router must learn to tell the texts apart. Plain copies would not do: equal experts give a router no gradient.

Source: Sukhbaatar et al. (2024), Branch-Train-MiX, arXiv:2403.07816; sparse upcycling is that of Komatsuzaki et al.
(2022), arXiv:2212.05055.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.routing import hooked, routers
from classifier_emergence.processes import check_alone
from classifier_emergence.progress import progress
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.tree import batches, last_states
from classifier_emergence.results import write_text_atomic
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.cross_entropy import cross_entropy
from classifier_emergence.training.evaluation import generated_ids
from classifier_emergence.training.group_trainer import EXPLODED, Schedule
from classifier_emergence.training.modules import MLP

GENERATED_TOGETHER = 40
ROUTER_INIT_SCALE = 0.1
_ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.gate\.weight")
_GAIN = re.compile(r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight")


@torch.no_grad()
def self_generated(
    lm: LanguageModel,
    openings: Sequence[str],
    n: int,
    *,
    new_tokens: int,
    seed: int,
    description: str | None = None,
) -> list[str]:
    """``n`` texts that the model continues from the openings in turn, sampled at temperature 1.

    What a model writes is like what it was trained on: a stand-in where there is no corpus.

    Raises:
        InputError: There are no openings.
    """
    if not openings:
        raise InputError("openings: none; give the model something to go on from")
    starts = [openings[i % len(openings)] for i in range(n)]
    texts: list[str] = []
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with progress(description, total=n) as advance, torch.random.fork_rng():
        torch.manual_seed(seed)  # generate() draws from the global generator
        for first in range(0, n, GENERATED_TOGETHER):
            ids, _ = generated_ids(lm, starts[first : first + GENERATED_TOGETHER], new_tokens, **sampling)
            texts += lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
            advance(len(ids))
    return texts


def join_experts(lm: LanguageModel, experts: Sequence[Path], *, top_k: int, seed: int) -> LanguageModel:
    """A Mixtral-class model with the base model's attention, norms and embeddings, and the experts' MLPs.

    A block whose MLP no adapter changes stays dense. With experts that are all the base model's own MLPs, it computes
    what the base model does.

    Args:
        lm: Of the Llama class, frozen; unchanged at the end.
        experts: Folders of PEFT adapters of its MLPs, of some blocks or all, one folder an expert.
        top_k: Experts a token goes to.
        seed: Of the routers' weights, normal with a tenth of the config's ``initializer_range``: so nearly even that no
            expert is shut out before it was tried.

    Raises:
        InputError: The base model is no Llama or has biases, for which Mixtral has no place; ``top_k`` does not fit the
            number of experts; or an adapter changes something else than MLPs.
    """
    base = lm.model
    config: Any = base.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise InputError(
            f"model {type(base).__name__}: only Llama without biases has the shape of Mixtral; choose another"
        )
    if not 1 <= top_k <= len(experts):
        raise InputError(f"top_k: {top_k} of {len(experts)} experts; choose 1 to {len(experts)}")
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
            "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
            "rope_parameters")  # fmt: skip
    shape = MixtralConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in kept},
        num_local_experts=len(experts),
        num_experts_per_tok=top_k,
        attn_implementation=config._attn_implementation,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        joined = MixtralForCausalLM(shape)
    shared = {name: tensor for name, tensor in base.state_dict().items() if ".mlp." not in name}
    lost = joined.load_state_dict(shared, strict=False)
    if lost.unexpected_keys or any(".mlp." not in name for name in lost.missing_keys):
        raise InputError(f"model {type(base).__name__}: its weights are not those of Mixtral; choose a plain Llama")
    mixture = replace(lm, model=joined)
    blocks: Any = mixture.blocks
    routed: set[int] = set()
    with torch.no_grad():
        for expert, folder in enumerate(experts):
            for number, (mlp, updated) in enumerate(merged_mlps(lm, folder)):
                gate, up, down = mlp
                blocks[number].mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
                blocks[number].mlp.experts.down_proj[expert] = down
                if updated:
                    routed.add(number)
        generator = torch.Generator().manual_seed(seed)
        for number, (block, dense) in enumerate(zip(blocks, lm.blocks, strict=True)):
            if number in routed:
                block.mlp.gate.weight.normal_(0.0, ROUTER_INIT_SCALE * config.initializer_range, generator=generator)
            else:
                block.mlp = copy.deepcopy(dense.mlp)
    joined.requires_grad_(False).eval()
    return mixture


def merge_adapter(lm: LanguageModel, adapter: Path) -> LanguageModel:
    """A copy of the base model with an adapter of its MLPs merged: the dense twin."""
    twin = replace(lm, model=copy.deepcopy(lm.model))
    blocks: Any = twin.blocks
    with torch.no_grad():
        for block, (weights, _) in zip(blocks, merged_mlps(lm, adapter), strict=True):
            for name, weight in zip(MLP, weights, strict=True):
                getattr(block.mlp, name).weight.copy_(weight)
    return twin


def merged_mlps(lm: LanguageModel, adapter: Path) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], bool]]:
    """Gate, up and down weights of every block, ``W + (alpha / rank) B A``, and whether the adapter updates them.

    The base model is left as it was.

    Raises:
        InputError: The adapter changes something else than the MLPs' linear maps.
    """
    wrapped = PeftModel.from_pretrained(lm.model, str(adapter))
    try:
        changed = {name for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
        if other := sorted(name for name in changed if name.rpartition(".")[2] not in MLP):
            raise InputError(f"{adapter}: it changes {other[0]}; give an adapter of {', '.join(MLP)} alone")
        for block in lm.blocks:
            mlp: Any = block.mlp
            gate, up, down = (getattr(mlp, name) for name in MLP)
            updated = any(isinstance(module, LoraLayer) for module in (gate, up, down))
            yield (_merged(gate), _merged(up), _merged(down)), updated
    finally:
        wrapped.unload()
        lm.model.requires_grad_(False).eval()


@torch.no_grad()
def _merged(module: Any) -> Tensor:
    weight: Tensor = module.weight.clone()  # of the base map, also where an update wraps it
    if isinstance(module, LoraLayer):
        update: Any = module
        weight += update.get_delta_weight("default")
    return weight


def load_balancing(logits: Tensor, top_k: int) -> Tensor:
    """Load-balancing loss ``E sum_e f_e P_e`` of one router.

    f_e is the share of all choices that fall on expert e, P_e its mean probability; 1 if both are even, E if one expert
    gets everything. Averaged over layers, each is balanced by itself (transformers pools all layers first, so that
    layers may make up for each other).

    Args:
        logits: (tokens, E).
        top_k: Experts a token goes to.

    Source: Fedus, Zoph and Shazeer (2021), Switch transformers, arXiv:2101.03961, equation 4.
    """
    experts = logits.shape[-1]
    probability = logits.float().softmax(-1)
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=experts) / len(chosen)
    return experts * (share * probability.mean(0)).sum()


@dataclass(frozen=True)
class Joint:
    """How routers and norm gains are trained together."""

    router_learning_rate: float
    """Fresh routers start far from where they must go, gains do not: their rate is ``schedule.learning_rate``."""
    balance: float
    """Weight of the load-balancing loss, averaged over layers."""


def train_expert(
    lm: LanguageModel,
    domains: Sequence[Sequence[Sequence[int]]],
    adapter: Adapter,
    schedule: Schedule,
    folder: Path,
    *,
    description: str | None = None,
) -> list[dict[str, Any]]:
    """Train a low-rank update of a dense model's MLPs with the language-modelling loss; write it as a PEFT adapter.

    Args:
        lm: Frozen; the update is taken off again at the end.
        domains: As of ``train_jointly``; one for an expert, all for the dense twin.
        adapter: Maps, rank and blocks of the update.
        schedule: Steps, batch size, learning rate, seed.
        folder: For the adapter.
        description: Shown with the progress bar.

    Returns:
        As ``train_jointly``, of a dense model.

    Raises:
        InputError: As ``train_jointly``, or the model has no such maps or blocks.
    """
    with adapted(lm, adapter, seed=schedule.seed) as wrapped:
        update = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        groups = [{"params": update, "lr": schedule.learning_rate}]
        curve = _fit(lm, domains, groups, schedule, 0.0, description)
        wrapped.save_pretrained(str(folder))
    return curve


def train_jointly(
    lm: LanguageModel,
    domains: Sequence[Sequence[Sequence[int]]],
    schedule: Schedule,
    joint: Joint,
    *,
    description: str | None = None,
) -> list[dict[str, Any]]:
    """Train what is not the experts' or the attention's: routers, if there are any, and the blocks' norm gains.

    The final norm stays as it is, and with it the readout that the lens uses. A dense model goes through the same
    steps on the same batches, its gains alone trained. Batches hold as many texts of every domain: what differs from
    batch to batch would else be how much there is of each, and routers would follow that.

    Args:
        lm: Frozen; changed in place, and frozen again at the end.
        domains: Token ids of the texts of every domain; every token but the first is predicted. Drawn without
            replacement in an order that the seed sets, and again when all of the domain were seen.
        schedule: Steps, batch size, rate of the gains, seed.
        joint: What concerns routers.
        description: Shown with the progress bar.

    Returns:
        Every ``schedule.every`` steps ``step``, ``loss`` (language modelling) and ``balance`` (mean over layers; None
        for a dense model): means over the steps since the entry before.

    Raises:
        InputError: The batch size is no multiple of the number of domains; or the loss is not finite or explodes: names
            the step and the likely cause.
    """
    gates = [p for name, p in lm.model.named_parameters() if _ROUTER.fullmatch(name)]
    gains = [p for name, p in lm.model.named_parameters() if _GAIN.fullmatch(name)]
    groups = [{"params": gains, "lr": schedule.learning_rate}]
    if gates:
        groups.append({"params": gates, "lr": joint.router_learning_rate})
    try:
        for parameter in (*gains, *gates):
            parameter.requires_grad_(True)
        return _fit(lm, domains, groups, schedule, joint.balance, description)
    finally:
        lm.model.requires_grad_(False)


def _fit(
    lm: LanguageModel,
    domains: Sequence[Sequence[Sequence[int]]],
    groups: list[dict[str, Any]],
    schedule: Schedule,
    balance_weight: float,
    description: str | None,
) -> list[dict[str, Any]]:
    """Steps of AdamW on groups of parameters; the curve."""
    check_alone("training of mixtures")
    if schedule.batch_size % len(domains):
        raise InputError(f"batch_size: {schedule.batch_size} for {len(domains)} domains; choose a multiple")
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    readout, top_k = lm.readout, getattr(lm.model.config, "num_experts_per_tok", 0)
    limit = EXPLODED * torch.tensor(len(readout.weight)).log().item()
    curve: list[dict[str, Any]] = []
    parts: list[tuple[float, float | None]] = []
    with progress(description, total=schedule.steps) as advance:
        for step, rows in enumerate(_drawn(domains, schedule), start=1):
            loss, balance = _losses(lm, rows, readout, top_k)
            total = loss if balance is None else loss + balance_weight * balance
            if not total.isfinite() or loss > limit:
                rates = "learning_rate, router_learning_rate" if len(groups) > 1 else "learning_rate"
                raise InputError(
                    f"{rates}: training diverged at step {step} (loss {loss.item():.4g}); choose less and run again"
                )
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            parts.append((loss.item(), None if balance is None else balance.item()))
            advance(1, f"loss {loss.item():.3f}")
            if step % schedule.every == 0 or step == schedule.steps:
                curve.append({"step": step, **_means(parts)})
                parts.clear()
    return curve


def _means(parts: Sequence[tuple[float, float | None]]) -> dict[str, float | None]:
    balances = [balance for _, balance in parts if balance is not None]
    return {
        "loss": sum(loss for loss, _ in parts) / len(parts),
        "balance": sum(balances) / len(balances) if balances else None,
    }


def _drawn(domains: Sequence[Sequence[Sequence[int]]], schedule: Schedule) -> Iterator[list[Sequence[int]]]:
    generator = torch.Generator().manual_seed(schedule.seed)
    each = schedule.batch_size // len(domains)
    left: list[list[int]] = [[] for _ in domains]
    for _ in range(schedule.steps):
        rows: list[Sequence[int]] = []
        for number, texts in enumerate(domains):
            while len(left[number]) < each:
                left[number] += torch.randperm(len(texts), generator=generator).tolist()
            rows += [texts[i] for i in left[number][:each]]
            left[number] = left[number][each:]
        yield rows


def _losses(
    lm: LanguageModel, rows: Sequence[Sequence[int]], readout: Readout, top_k: int
) -> tuple[Tensor, Tensor | None]:
    """Mean language-modelling loss over all predicted tokens, and the mean balance over routers."""
    if not top_k:
        return _token_losses(lm, rows, readout).mean(), None
    with hooked(lm) as outputs:
        losses = _token_losses(lm, rows, readout)
    return losses.mean(), torch.stack([load_balancing(logits, top_k) for logits, _, _ in outputs.values()]).mean()


def _token_losses(lm: LanguageModel, rows: Sequence[Sequence[int]], readout: Readout) -> Tensor:
    """Losses of all predicted tokens, text after text.

    Texts stand in one row, without padding: where positions start again at 0, transformers keeps attention apart.
    """
    ids = torch.tensor([token for row in rows for token in row], device=lm.model.device)
    positions = torch.cat([torch.arange(len(row), device=lm.model.device) for row in rows])
    normed = last_states({"input_ids": ids[None], "position_ids": positions[None]}, lm.model)
    predicted = positions[1:] > 0
    return cross_entropy(normed[:-1][predicted], readout, ids[1:][predicted])


@torch.no_grad()
def text_losses(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """(texts,) mean loss of each text's tokens but the first, in nats."""
    readout = lm.readout
    means = torch.empty(len(texts))
    for batch in batches(texts):
        losses = _token_losses(lm, [texts[i] for i in batch], readout)
        means[batch] = torch.stack([part.mean() for part in losses.split([len(texts[i]) - 1 for i in batch])])
    return means


def trained_tensors(lm: LanguageModel) -> dict[str, Tensor]:
    """What ``train_jointly`` trains, by name; with the experts' adapters it gives the model back."""
    state = lm.model.state_dict()
    return {name: t.clone() for name, t in state.items() if _ROUTER.fullmatch(name) or _GAIN.fullmatch(name)}


def save_routers(lm: LanguageModel, folder: Path) -> Path:
    """Write only what ``routers.load_routers`` reads, in its layout: routers, gains and the unembedding."""
    readout = lm.readout
    tensors = trained_tensors(lm) | {
        "model.norm.weight": readout.norm.get_parameter("weight"),
        "lm_head.weight": readout.weight,
    }
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = lm.model.config
    size, sparse = config.num_hidden_layers, routers(lm)
    dense = [number for number in range(size) if number not in sparse]  # the key by which Qwen's configs tell
    facts = {"model_type": config.model_type, "num_hidden_layers": size, "mlp_only_layers": dense}
    write_text_atomic(folder / "config.json", json.dumps(facts))
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder
