"""Stage lenses@model: is it the lens? What two better lenses read of the states that the logit lens reads.

The Jacobian lens and a tuned lens, each fitted twice, on disjoint halves of text without any arithmetic, beside the
logit lens: on the prompt bank before training, with random weights and with permuted maps; and on held-out problems
after dual reward and after chains of thought, with maps of the untrained model and with Jacobians of the trained one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from classifier_emergence.manifest import seal
from classifier_emergence.mixtures.upcycling import self_generated
from classifier_emergence.models.loading import load, with_adapter
from classifier_emergence.reading.jacobian_lens import jacobian
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, feed, read_states
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.tuned_lens import Tuning, divergence, tuned_maps
from classifier_emergence.reading.vocabulary import WordTokens, word_tokens
from classifier_emergence.statistics import permutation_p
from classifier_emergence.tasks.arithmetic import LENS, OPERATIONS, STYLES, labelled, prompt_bank
from classifier_emergence.tasks.problems import COT_REPORTED, NEUTRAL, Problem
from experiments.params import Params
from experiments.shared.lens import OPERATION_WORDS, against_null, contrast, null_words, own_class
from experiments.shared.lens_fits import FITS, kept_maps, selected
from experiments.shared.runs import Runs, kept_adapter
from experiments.shared.stage import main, read_residuals
from experiments.shared.study import ProblemStudy
from experiments.shared.summaries import accuracy_curve, mean_of, over, share_of

MAPS = Path("data/lenses")
"""Where the maps of the lenses lie, by model."""
OPENINGS = [" ".join(sentence.split()[:3]) for sentence in NEUTRAL]
"""What self-generated texts begin with, in turn."""
Lens = Callable[[Tensor], Tensor]
"""States (layers, prompts, d) to what the readout is given."""


@dataclass(frozen=True)
class Asked:
    """Prompts that are read, and words that are looked for."""

    own: Tensor
    """(n,) class of each."""
    clusters: list[str]
    """What each shares with others: intervals resample these whole, and layers are chosen on half of them."""
    words: list[WordTokens]
    null: list[list[WordTokens]]
    """Of each word, others that match it; see ``shared.lens.null_words``."""


class LensStudy:
    """A model, and the text on which its lenses are fitted."""

    def __init__(self, params: Params, key: str) -> None:
        self.params, self.settings = params, params.lenses
        self.lm = load(key, params.registry)

    @cached_property
    def bank(self) -> dict[str, Asked]:
        """The first prompts of the bank, by style."""
        return {style: self.asked(self.lm, style) for style in STYLES}

    def asked(self, lm: LanguageModel, style: str) -> Asked:
        """The same, with words that match the operations' in a model's unembedding."""
        prompts = prompt_bank(style, self.params.bank)[: len(OPERATIONS) * self.settings.pairs]
        own = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in prompts])
        return Asked(own, [str(prompt.template) for prompt in prompts], *self.words(lm, OPERATIONS))

    def words(self, lm: LanguageModel, words: Sequence[str]) -> tuple[list[WordTokens], list[list[WordTokens]]]:
        """Words and the null of each."""
        targets = [word_tokens(word, lm.tokenizer) for word in words]
        return targets, null_words(lm, targets, self.params.logit_lens.null_words, OPERATION_WORDS)

    def states(self, lm: LanguageModel, style: str) -> Tensor:
        """(layers, prompts, d) of the bank's prompts."""
        prompts = prompt_bank(style, self.params.bank)[: len(OPERATIONS) * self.settings.pairs]
        return residual_stream(lm, [prompt.text for prompt in prompts])

    def fed(self, texts: Sequence[str], length: int | None = None) -> list[Fed]:
        """Texts as tokens, read at every one but the leading ones and the last: where a Jacobian has its sources."""
        every = feed(self.lm.tokenizer, texts, position="all")
        cut = [replace(fed, ids=fed.ids[:length], read=fed.read[:length]) for fed in every]
        return [replace(fed, read=fed.read[self.settings.skip : -1]) for fed in cut]

    def fed_anew(self, texts: Sequence[str]) -> list[Fed]:
        """The same, but read at no token of an opening, whose states other texts have, too."""
        ids = self.lm.tokenizer
        shared = [max((len(ids(o)["input_ids"]) for o in OPENINGS if text.startswith(o)), default=0) for text in texts]
        every = [
            replace(fed, read=tuple(at for at in fed.read if at >= first))
            for fed, first in zip(self.fed(texts), shared, strict=True)
        ]
        return [fed for fed in every if fed.read]

    def jacobians(self, lm: LanguageModel, texts: Sequence[str], what: str) -> LensMaps:
        """Their mean over the beginnings of texts."""
        fed = self.fed(texts, self.settings.jacobian_tokens)
        return LensMaps.mean(
            [LensMaps.linear(jacobian(lm, each.ids, skip=self.settings.skip, description=what)) for each in fed]
        )


def run(params: Params, key: str) -> None:
    """Fit the lenses, read everything through them and write one result."""
    settings = params.lenses
    with Runs("lenses", key, params, LensStudy, "bank", "dual_reward", "dual_reward_long", "cot_alignment") as runs:
        texts = runs.once("text", write_texts)["texts"]
        test, validation, rest = texts[: settings.test_texts], *_split(texts[settings.test_texts :], settings)
        fits = {"jacobian": fit_jacobians(runs, rest), "tuned": fit_tuned(runs, rest, validation)}
        lenses: dict[str, Sequence[Lens]] = {"logit": [_identity], **fits}
        whole = LensMaps.mean(fits["jacobian"])
        read_with: dict[str, Lens] = {"logit": _identity, "jacobian": whole, "tuned": fits["tuned"][0]}
        result = {
            "model": key,
            "layers": runs.study.lm.layers,
            "texts": {"jacobian": settings.jacobian_texts, "tuned": len(rest) // FITS, "test": len(test)},
            "untrained": runs.once("untrained", read_untrained, lenses),
            "agreement": runs.once("agreement", agreement, fits),
            "divergence": runs.once("divergence", held_out_divergence, lenses, test),
            "controls": {
                "permuted": runs.once("permuted", read_permuted, whole),
                "random_weights": runs.once("random", read_random, rest),
            },
            "trained": {
                name: runs.once(name, read_trained, name, read_with, rest) for name in ("dual_reward", "cot_alignment")
            },
        }
        for name, parts in fits.items():
            for i, maps in enumerate(parts):
                maps.save(MAPS / key / f"{name}-{i}.safetensors")
        seal(MAPS / key)
        runs.finish(result)


# --- Fitting ---


def write_texts(study: LensStudy, _: Path) -> dict[str, Any]:
    """Text that the model writes itself, from the beginnings of sentences that are about no numbers."""
    settings = study.settings
    texts = self_generated(
        study.lm, OPENINGS, settings.texts, new_tokens=settings.new_tokens, seed=settings.seed,
        description=f"texts written by {study.lm.key}",
    )  # fmt: skip
    return {"texts": texts}


def fit_jacobians(runs: Runs, texts: Sequence[str]) -> list[LensMaps]:
    """Of neutral sentences and self-generated text, as many of each, each text in one fit."""
    study, n = runs.study, FITS * runs.params.lenses.jacobian_texts
    mixed = [*NEUTRAL[: n // 2], *texts][:n]

    def of_text(i: int) -> LensMaps:
        text = f"Jacobians of {study.lm.key}: text {i + 1} of {n}"
        return kept_maps(runs, f"jacobian-{i}", lambda: study.jacobians(study.lm, [mixed[i]], text))

    return [LensMaps.mean([of_text(i) for i in range(fit, n, FITS)]) for fit in range(FITS)]


def fit_tuned(runs: Runs, texts: Sequence[str], validation: Sequence[str]) -> list[LensMaps]:
    """On all positions of the model's own text, each text in one fit."""
    study, settings = runs.study, runs.params.lenses

    def fit(i: int) -> LensMaps:
        states, held = (read_states(study.lm, fed) for fed in (study.fed(texts[i::FITS]), study.fed_anew(validation)))
        text = f"tuned lens of {study.lm.key}, fit {i + 1} of {FITS}"
        tuning = Tuning(**settings.tuned.model_dump())
        return tuned_maps(states, held, study.lm.readout, tuning, seed=settings.seed + i, description=text)

    return [kept_maps(runs, f"tuned-{i}", partial(fit, i)) for i in range(FITS)]


def _split(texts: Sequence[str], settings: Any) -> tuple[Sequence[str], Sequence[str]]:
    return texts[: settings.validation_texts], texts[settings.validation_texts :]


def _identity(states: Tensor) -> Tensor:
    return states


# --- Reading ---


def read_untrained(study: LensStudy, _: Path, lenses: Mapping[str, Sequence[Lens]]) -> dict[str, Any]:
    """Every fit of every lens on the bank, and each lens against the logit lens, prompt by prompt."""
    found: dict[str, Any] = {name: {} for name in lenses}
    saved = read_residuals(study.lm.key)
    for style, asked in study.bank.items():
        states = saved[f"bank/{style}"][:, : len(asked.own)]
        plain: Sequence[np.ndarray] = []
        for name, fits in lenses.items():
            text = f"{name} lens of {study.lm.key}: {style} prompts"
            read = [words_in(study, study.lm, fit(states), asked, text) for fit in fits]
            tables, hits = [table for table, _ in read], [selected for _, selected in read]
            plain = plain or hits
            gains = [study_mean(study, x.astype(float) - plain[0], asked.clusters) for x in hits]
            found[name][style] = {
                "fits": tables,
                "selected": over([table["selected"] for table in tables]),
                "peak": over([_peak(table) for table in tables]),
                "minus_logit": over(gains),
            }
    return found


def words_in(
    study: LensStudy, lm: LanguageModel, mapped: Tensor, asked: Asked, text: str | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """What a lens says of the own words at every layer, against other words, and ``selected`` of its choices.

    Args:
        study: For the settings.
        lm: Its readout reads.
        mapped: (layers, prompts, d).
        asked: Whose words.
        text: Shown with the progress bar.
    """
    confidence, resamples = study.params.confidence, study.params.logit_lens.resamples
    n, blocks = len(asked.words), slice(layer_row(0), None)
    groups = [word.ids for word in asked.words] + [word.ids for words in asked.null for word in words]
    ranked = [[o] for o in asked.own.tolist()]
    scores = lens_scores(mapped, lm.readout, groups, ranked=ranked, description=text)
    log_alignment = scores.log_alignment[..., :n]
    null_log = scores.log_alignment[..., n:].unflatten(-1, (n, -1))
    alignment = mean_of(
        own_class(log_alignment, asked.own).exp().double().numpy(), confidence, resamples, clusters=asked.clusters
    )
    log_contrast = contrast(log_alignment[..., None], asked.own)[:, 0]
    # Four matched words, one for each class, name the class by accident, too: some of them often.
    right = (log_alignment.argmax(-1) == asked.own).numpy()
    null_right = (null_log.argmax(2) == asked.own[:, None]).double().mean(1).numpy()
    hits, layers = selected(right, asked.clusters)
    choice, upper = accuracy_curve(right, confidence, clusters=asked.clusters), np.quantile(null_right, 0.95, axis=-1)
    above = (np.array(choice["interval"])[blocks, 0] > upper[blocks]).nonzero()[0]
    table = {
        "alignment": alignment["mean"],
        "interval": alignment["interval"],
        "rank": np.median(scores.rank[..., 0].numpy(), axis=-1),
        "log_contrast": log_contrast,
        "null": against_null(alignment["mean"], log_contrast, null_log, asked.own)[0],
        "choice": {
            **choice,
            "null_95": upper,
            "first_above_null": lm.layers[layer_row(int(above[0]))] if len(above) else None,
            "p": permutation_p(right.mean(-1), null_right),
            # A maximum over layers, judged among such maxima.
            "p_over_layers": permutation_p(right[blocks].mean(-1).max(), null_right[blocks].max(0)),
        },
        "selected": {
            **share_of(hits, confidence, clusters=asked.clusters),
            "layers": [lm.layers[row] for row in layers],
        },
    }
    return table, hits


def _peak(table: Mapping[str, Any]) -> dict[str, Any]:
    """The largest mean alignment at a layer between the embedding and the last, with its interval."""
    row = 1 + int(np.argmax(table["alignment"][1:-1]))
    return {"mean": float(table["alignment"][row]), "interval": table["interval"][row], "n": table["choice"]["n"]}


def study_mean(study: LensStudy, values: np.ndarray, clusters: Sequence[str]) -> dict[str, Any]:
    """Mean with an interval that resamples clusters."""
    return mean_of(values, study.params.confidence, study.params.logit_lens.resamples, clusters=clusters)


def agreement(study: LensStudy, _: Path, fits: Mapping[str, Sequence[LensMaps]]) -> dict[str, Any]:
    """Do two fits on disjoint text read the same? By layer, on symbol prompts.

    ``states``: cosine between what they make of a prompt's state, less the mean over prompts. ``choice``: share of
    prompts of which both choose the same word.
    """
    asked = study.bank["symbol"]
    states = read_residuals(study.lm.key)["bank/symbol"][:, : len(asked.own)]
    found = {}
    for name, fits_of in fits.items():
        made = [fit(states) for fit in fits_of]
        first, second = (x - x.mean(1, keepdim=True) for x in made)
        cosine = cosine_similarity(first, second, dim=-1).double().numpy()
        same = torch.eq(*(chosen(study.lm, x, asked.words) for x in made)).numpy()
        found[name] = {
            "states": study_mean(study, cosine, asked.clusters),
            "choice": accuracy_curve(same, study.params.confidence, clusters=asked.clusters),
        }
    return found


@torch.no_grad()
def chosen(lm: LanguageModel, mapped: Tensor, words: Sequence[WordTokens]) -> Tensor:
    """(layers, prompts): which of the words has the largest alignment, without a pass over the vocabulary."""
    ids = torch.tensor([i for word in words for i in word.ids])
    logits = lm.readout.unembed(lm.readout.norm(mapped.flatten(0, 1)), ids)
    totals = [part.logsumexp(-1) for part in logits.split([len(word.ids) for word in words], -1)]
    return torch.stack(totals, -1).argmax(-1).view(mapped.shape[:2])


def held_out_divergence(
    study: LensStudy, _: Path, lenses: Mapping[str, Sequence[Lens]], texts: Sequence[str]
) -> dict[str, Any]:
    """How far each lens is from the model's own distribution on text that no lens was fitted on, in nats, by layer."""
    fed = study.fed_anew(texts)
    chosen = np.random.default_rng(study.settings.seed)
    fed = [
        replace(each, read=tuple(sorted(chosen.choice(each.read, study.settings.test_positions, replace=False))))
        for each in fed if len(each.read) >= study.settings.test_positions
    ]  # fmt: skip
    states = read_states(study.lm, fed)
    clusters = [str(i) for i, each in enumerate(fed) for _ in each.read]
    return {
        name: [
            study_mean(study, divergence(fit(states), states[-1], study.lm.readout).double().numpy(), clusters)
            for fit in fits
        ]
        for name, fits in lenses.items()
    }


# --- Controls ---


def read_permuted(study: LensStudy, _: Path, maps: LensMaps) -> dict[str, Any]:
    """The Jacobian lens with the outputs of its maps permuted, and with its maps given to other layers, on symbols."""
    asked = study.bank["symbol"]
    states = read_residuals(study.lm.key)["bank/symbol"][:, : len(asked.own)]
    return {
        kind: {
            "symbol": _over_draws([
                words_in(study, study.lm, maps.permuted(seed, layers=layers)(states), asked)[0]
                for seed in study.settings.control_seeds
            ])
        }
        for kind, layers in (("outputs", False), ("layers", True))
    }  # fmt: skip


def read_random(study: LensStudy, _: Path, texts: Sequence[str]) -> dict[str, Any]:
    """The same architecture with random weights: what its Jacobian lens and its logit lens choose."""
    styles = ("symbol", "story")
    read: dict[str, dict[str, list[dict[str, Any]]]] = {name: {s: [] for s in styles} for name in ("logit", "jacobian")}
    for seed in study.settings.control_seeds:
        lm = untrained_twin(study.lm, seed)
        maps = study.jacobians(lm, texts[: study.settings.control_texts], f"Jacobian of random weights {seed}")
        for style in styles:
            states, asked = study.states(lm, style), study.asked(lm, style)
            for name, mapped in (("logit", states), ("jacobian", maps(states))):
                read[name][style].append(words_in(study, lm, mapped, asked)[0])
    return {name: {style: _over_draws(tables) for style, tables in by.items()} for name, by in read.items()}


def _over_draws(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"selected": over([table["selected"] for table in tables]), "peak": over([*map(_peak, tables)])}


def untrained_twin(lm: LanguageModel, seed: int) -> LanguageModel:
    """A model of the same configuration with the weights that its family starts training from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(lm.model)(lm.model.config)
    return LanguageModel(f"{lm.key} with random weights", model.float().eval().requires_grad_(False), lm.tokenizer)


# --- After training ---


def read_trained(
    study: LensStudy, _: Path, name: str, lenses: Mapping[str, Lens], texts: Sequence[str]
) -> dict[str, Any]:
    """A trained word under all lenses, on problems whose operands were never trained on, seed by seed.

    Lenses are those of the untrained model, and for the first seed (``jacobian_after``) Jacobians of the trained one.
    """
    problems = problems_of(study, name)
    folders = adapters_of(study, name)
    before = read_problems(study, study.lm, problems, lenses)
    seeds: list[dict[str, Any]] = []
    for folder in folders:
        with trained(study, folder) as lm:
            own = dict(lenses)
            if not seeds:
                maps = study.jacobians(lm, texts[: study.settings.control_texts], f"Jacobian after {name}")
                own["jacobian_after"] = maps
            seeds.append(read_problems(study, lm, problems, own))
    after = {
        lens: {
            style: {part: over([seed[lens][style][part] for seed in seeds if lens in seed])
                    for part in ("alignment", "choice", "inner_peak", "selected")}
            for style in STYLES
        }
        for lens in seeds[0]
    }  # fmt: skip
    return {"layer": study.lm.layers[problems.row], "before": before, "seeds": seeds, "after": after}


def problems_of(study: LensStudy, name: str) -> ProblemStudy:
    """The held-out problems of a training stage."""
    params = study.params
    reserved = {"dual_reward": labelled(LENS)[0], "cot_alignment": COT_REPORTED}[name]
    settings, depth = getattr(params, name), params.logit_lens.depth
    return ProblemStudy(study.lm, params, settings, depth=depth, reserved=[Problem.parse(text) for text in reserved])


def adapters_of(study: LensStudy, name: str) -> list[Path]:
    """The folders of a training stage's adapters, one a seed."""
    params, key = study.params, study.lm.key
    if name == "cot_alignment":
        return [kept_adapter(name, key, f"chain_of_thought-{seed}") for seed in params.cot_alignment.seeds]
    long = [kept_adapter("dual_reward_long", key, f"seed-{seed}") for seed in params.dual_reward_long.seeds]
    return [kept_adapter(name, key, f"seed-{params.dual_reward.seeds[0]}"), *long]


@contextmanager
def trained(study: LensStudy, folder: Path) -> Iterator[LanguageModel]:
    """The model with an adapter merged in."""
    yield replace(with_adapter(load(study.lm.key, study.params.registry), folder), key=study.lm.key)


def read_problems(
    study: LensStudy, lm: LanguageModel, problems: ProblemStudy, lenses: Mapping[str, Lens]
) -> dict[str, Any]:
    """Every lens on the first held-out problems: by layer, at the classifier layer and at its peak."""
    n = study.settings.problems
    found: dict[str, Any] = {name: {} for name in lenses}
    targets, null = study.words(study.lm, problems.operations)
    for style in STYLES:
        states = residual_stream(lm, problems.prompts(style)[:n])
        asked = Asked(torch.tensor(problems.own[:n]), problems.units(style)[:n], targets, null)
        for name, lens in lenses.items():
            table, _ = words_in(study, lm, lens(states), asked)
            found[name][style] = {
                **at_row(table, problems.row),
                "inner_peak": _peak(table),
                "by_layer": by_layer(table),
            }
    return found


def by_layer(table: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure shows of every layer."""
    kept = ("alignment", "interval", "rank")
    return {**{name: table[name] for name in kept}, "choice": {k: table["choice"][k] for k in ("accuracy", "interval")}}


def at_row(table: Mapping[str, Any], row: int) -> dict[str, Any]:
    """Alignment and choice at a row that was set beforehand, and choice at layers that were chosen on other prompts."""
    choice, n = table["choice"], table["choice"]["n"]
    return {
        "alignment": {"mean": float(table["alignment"][row]), "interval": table["interval"][row], "n": n},
        "choice": {"accuracy": choice["accuracy"][row], "interval": choice["interval"][row], "n": n},
        "selected": table["selected"],
    }


if __name__ == "__main__":
    main(run, __doc__)
