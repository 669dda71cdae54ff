"""Stage probing@model: at which layers does a linear probe find the operation, and does it point at a word?

Reported protocol: 16 prompts, scikit-learn's logistic regression on unscaled states, four unshuffled folds, L0 to the
last layer. Controlled: the prompt bank with operand pairs or templates held out, baselines, the layer chosen on
validation; intervals resample what is held out. Flaw ablations: the reported protocol with probes at their optimum, on
states of a model without its causal mask, and with attention all but switched off.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.directions import largest_cosines, project
from classifier_emergence.reading.layers import layer_labels, layer_row, peak_row, row_at
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import Probes, fit_probes, stratified_folds
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.results import write_result
from classifier_emergence.statistics import expected_max_cosine, permutation_p
from classifier_emergence.tasks.arithmetic import HELD_OUT, OPERATIONS, REPORTED, STYLES, labelled, prompt_bank
from experiments.params import Params
from experiments.shared.lens import null_words, p_over_layers
from experiments.shared.probing import TOLERANCE, as_reported, bag_of_tokens, held_out_probes
from experiments.shared.stage import FLAWED_SETS, main, read_residuals, result_path
from experiments.shared.summaries import accuracy_curve, mean_of, paired, share_of

N_FOLDS_REPORTED = 4
Folds = Sequence[tuple[Tensor, Tensor]]


def run(params: Params, key: str) -> None:
    """Fit every probe and write one result."""
    lm = load(key, params.registry)
    states = read_residuals(key)
    reported = {name: reported_set(states[f"reported/{name}"], name, params) for name in REPORTED}
    flaws = {
        flaw: {name: reported_curve(states[f"{flaw}/{name}"], name, params) for name in FLAWED_SETS}
        for flaw in ("no_causal_mask", "scaled_attention")
    }
    result = {
        "model": key,
        "layers": lm.layers,
        "reported": {**reported, "held_out": held_out(states, reported["symbol"]["peak"]["layer"], lm, params)},
        "flaws": flaws,
        "controlled": {style: controlled(states[f"bank/{style}"], style, lm, params) for style in STYLES},
        "directions": directions(lm, states, params),
    }
    write_result(result_path("probing", key), result)


def reported_curve(states: Tensor, name: str, params: Params) -> dict[str, Any]:
    """The originals' curve on 16 prompts, by their instrument; see ``curve_of``."""
    y, folds = sixteen(name)
    early = [as_reported(states[:, train], y[train], C=params.probing.C) for train, _ in folds]
    return curve_of(hits_of(early, states, y, folds), folds, params)


def reported_set(states: Tensor, name: str, params: Params) -> dict[str, Any]:
    """That curve beside that of converged probes, and how far from convergence the originals' probes stop.

    ``excess`` is by how much their objective lies above the minimum, as a fraction of it, mean over folds. The null of
    a best layer is that of converged probes, of which all relabellings can be fitted: ``p`` is the share of them whose
    best layer is as good, for either instrument.
    """
    y, folds = sixteen(name)
    early = [as_reported(states[:, train], y[train], C=params.probing.C) for train, _ in folds]
    converged = [fit_probes(states[:, train], y[train], C=params.probing.C) for train, _ in folds]
    hits, right = (hits_of(probes, states, y, folds) for probes in (early, converged))
    null = relabelled_peaks(states, y, folds, params.probing.C).flatten()[1:].numpy()  # the first is the true labelling
    chosen = np.random.default_rng(params.probing.seed).permutation(len(null))[: params.probing.reported_shuffles]
    curves = [curve_of(correct, folds, params) for correct in (hits, right)]
    for curve in curves:
        curve["peak"] |= {
            "shuffled_accuracy_95": np.quantile(null[chosen], 0.95),
            "p": permutation_p(curve["peak"]["accuracy"], null[chosen]),
        }
    by_prompt, by_prompt_converged = (correct[layer_row(0) :].double().mean(0) for correct in (hits, right))
    return {
        **curves[0],
        "optimum": curves[1],
        "excess": torch.stack([a.objective / b.objective - 1 for a, b in zip(early, converged, strict=True)]).mean(0),
        "iterations": torch.stack([probes.iterations for probes in early]).double().mean(0),
        "early_minus_converged": paired(by_prompt, by_prompt_converged, params.confidence, range(len(y))),
    }


def sixteen(name: str) -> tuple[Tensor, Folds]:
    """Classes of a set of the originals' prompts, and their unshuffled folds: four prompts of one template."""
    y = torch.tensor(labelled(REPORTED[name])[1])
    return y, stratified_folds(y, N_FOLDS_REPORTED)


def hits_of(fitted: Sequence[Probes], states: Tensor, y: Tensor, folds: Folds) -> Tensor:
    """(layers, prompts): whether the probes of each fold are right on the prompts that they were not fitted on."""
    hits = torch.zeros(states.shape[:2], dtype=torch.bool)
    for probes, (_, test) in zip(fitted, folds, strict=True):
        hits[:, test] = probes.predict(states[:, test]) == y[test]
    return hits


def curve_of(hits: Tensor, folds: Folds, params: Params) -> dict[str, Any]:
    """Accuracy by layer, mean and population std over folds, and the best layer.

    The originals start at L0, so the best layer is sought from there; row ``emb`` is ours.
    """
    curve = accuracy_curve(hits, params.confidence)
    best, n_layers = peak_row(curve["accuracy"]), len(hits) - 1
    peak = {name: curve[name][best] for name in ("accuracy", "interval")}
    peak |= {"layer": layer_labels(n_layers)[best], "depth": best / n_layers, "n": curve["n"]}
    by_fold = torch.stack([hits[:, test].double().mean(-1) for _, test in folds])
    return {**curve, "std": by_fold.std(0, unbiased=False), "peak": peak}


def relabelled_peaks(states: Tensor, y: Tensor, folds: Folds, C: float) -> Tensor:
    """(24, 24, 24): the best layer's accuracy of converged probes, for every relabelling within folds.

    A fold holds one prompt of each of the four classes, so its labels can be permuted in 24 ways, and those of four
    folds in 24^4; but where all folds are permuted alike classes only get other names, so the first fold keeps its
    labels. Probes do not see names either: of the three folds that one is fitted on the first keeps its labels, so
    that 24^2 fits a fold serve all.
    """
    ways = torch.tensor(list(permutations(range(len(OPERATIONS)))))  # ways[i]: class -> label; ways[0] changes nothing
    number = {tuple(way): i for i, way in enumerate(ways.tolist())}
    # The way to label a fold once the names of the labels are changed so that another fold, of way i, has its own.
    renamed = torch.tensor([[number[tuple(one.argsort()[other].tolist())] for other in ways] for one in ways])
    each = torch.arange(len(ways))
    of_fold = torch.meshgrid(torch.tensor([0]), each, each, each, indexing="ij")
    pairs = torch.cartesian_prod(each, each)
    correct = torch.zeros(len(states), *of_fold[0].shape, dtype=torch.int16)
    for k, (_, test) in enumerate(folds):
        first, second, third = others = [fold for fold in range(len(folds)) if fold != k]
        rows = torch.cat([folds[fold][1] for fold in others])
        own = y[rows].view(3, -1)
        labels = torch.cat(
            [own[0].expand(len(pairs), -1), ways[pairs[:, 0]][:, own[1]], ways[pairs[:, 1]][:, own[2]]], 1
        )
        guesses = fit_probes(states[:, rows], labels, C=C, tol=TOLERANCE).predict(states[:, test])
        hits = (guesses[:, None] == ways[:, y[test]][:, None]).sum(-1, dtype=torch.int16).unflatten(2, (len(ways), -1))
        correct += hits[(slice(None), *(renamed[of_fold[first], of_fold[fold]] for fold in (k, second, third)))]
    return (correct[layer_row(0) :].amax(0)[0] / len(y)).double()


def held_out(states: dict[str, Tensor], layer: str, lm: LanguageModel, params: Params) -> dict[str, Any]:
    """The eight held-out symbol prompts, by the probe of one layer refitted on all 16 prompts, and how sure it is.

    ``norm`` is that of the training states: the penalty sees scale, and unscaled states of small norm make an unsure
    probe.
    """
    row = slice(at := lm.layers.index(layer), at + 1)
    x, y = states["reported/symbol"][row], torch.tensor(labelled(REPORTED["symbol"])[1])
    prompts, truth = labelled(HELD_OUT)
    fitted = {"": as_reported(x, y, C=params.probing.C), "optimum": fit_probes(x, y, C=params.probing.C)}
    found: dict[str, Any] = {}
    for name, probes in fitted.items():
        probability = probes.predict_proba(states["reported/held_out"][row])[0]
        predicted = probability.argmax(-1)
        found[name] = {
            "score": share_of(predicted == torch.tensor(truth), params.confidence),
            "confidence": mean_of(probability.amax(-1), params.confidence, params.logit_lens.resamples),
            "prompts": [
                {"prompt": prompt, "operation": OPERATIONS[own], "predicted": OPERATIONS[guess], "probability": p.max()}
                for prompt, own, guess, p in zip(prompts, truth, predicted, probability, strict=True)
            ],
        }
    norm = torch.linalg.vector_norm(x[0], dim=-1).median()
    return {"layer": layer, "norm": norm, **found.pop(""), **found}


def controlled(states: Tensor, style: str, lm: LanguageModel, params: Params) -> dict[str, Any]:
    """Accuracy of standardised probes and of token counts, with operand pairs or with templates held out.

    Both are compared prompt by prompt, and so is the probe with what the lens would choose at the originals' depth;
    intervals resample what is held out.
    """
    settings, bank, confidence = params.probing, prompt_bank(style, params.bank), params.confidence
    y = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in bank])
    chosen = lens_choice(lm, states[row_at(params.logit_lens.depth, lm.n_layers)]) == y
    groups: dict[str, list[Any]] = {"operands": [p.pair for p in bank], "templates": [p.template for p in bank]}
    result = {}
    for name, group in groups.items():
        probes = held_out_probes(states, y, group, settings, seed=settings.seed)
        bag = bag_of_tokens([p.text for p in bank], lm.tokenizer, y, group, settings, seed=settings.seed)
        result[f"held_out_{name}"] = {
            **probes.with_selectivity(confidence, torch.float32, clusters=group),
            "bag_of_tokens": share_of(bag, confidence, clusters=[str(label) for label in group]),
            "minus_bag_of_tokens": {
                **paired(probes.correct[:, 0], bag, confidence, group),
                "selected": paired(probes.selected[0], bag, confidence, group),
            },
            "selected_minus_lens": paired(probes.selected[0], chosen, confidence, group),
        }
    return result


def lens_choice(lm: LanguageModel, states: Tensor) -> Tensor:
    """(prompts,): the operation word with the largest alignment, of states (prompts, d) of one layer."""
    words = [word_tokens(operation, lm.tokenizer).ids for operation in OPERATIONS]
    normed = lm.readout.norm(states.to(lm.readout.weight.device))
    scores = [lm.readout.unembed(normed, torch.tensor(ids)).logsumexp(-1).cpu() for ids in words]
    return torch.stack(scores).argmax(0)


def directions(lm: LanguageModel, states: dict[str, Tensor], params: Params) -> dict[str, Any]:
    """Where the operation words stand in the vocabulary, seen from each class's direction.

    The null of a word is other words. That of the largest cosine with any token is the same direction made of labels
    that are permuted within operand pairs: rows of an unembedding and states lie in few dimensions, so that random
    directions of equal variance, for which ``expected_max_cosine`` holds, come nowhere near.
    """
    targets = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
    null = null_words(lm, targets, params.probing.null_words, OPERATIONS, fewest=params.logit_lens.null_words)
    result: dict[str, Any] = {
        "reported": reported_direction(lm, states["reported/symbol"], params),
        "expected_max_cosine": expected_max_cosine(*lm.readout.weight.shape),
        "null_words": [len(words) for words in null],
    }
    row = row_at(params.logit_lens.depth, lm.n_layers)
    for style in STYLES:
        bank = prompt_bank(style, params.bank)
        x, y = states[f"bank/{style}"], torch.tensor([OPERATIONS.index(p.operation) for p in bank])
        shuffles = permuted_within(y, [p.pair for p in bank], params.probing.direction_shuffles, params.probing.seed)
        vectors = directions_of(x, y[None], params.probing.C)
        permuted = directions_of(x[row : row + 1], shuffles, params.probing.C)
        result[style] = {
            kind: {
                **words_of_directions(lm, vectors[kind][:, 0], targets, null),
                "largest": largest_cosine(lm, vectors[kind][row, 0], permuted[kind][0]),
            }
            for kind in vectors
        }
    return result


def directions_of(x: Tensor, labels: Tensor, C: float) -> dict[str, Tensor]:
    """(layers, sets, classes, d) each: rows of probes and means of classes, less what all classes share.

    A softmax does not see that. For states (layers, n, d) and labels (sets, n).
    """
    probes = fit_probes(x, labels, C=C, standardise=True, tol=TOLERANCE if len(labels) > 1 else 1e-6).coef
    member = torch.nn.functional.one_hot(labels).to(x)
    means = (member / member.sum(1, keepdim=True)).mT @ x[:, None]
    return {name: v - v.mean(2, keepdim=True) for name, v in (("probe", probes), ("class_mean", means))}


def permuted_within(y: Tensor, groups: Sequence[object], n: int, seed: int) -> Tensor:
    """(n, prompts): labels permuted within each group, so that they stay as balanced over groups as they were."""
    generator, shuffles = np.random.default_rng(seed), y.repeat(n, 1)
    for group in dict.fromkeys(groups):
        at = torch.tensor([i for i, other in enumerate(groups) if other == group])
        shuffles[:, at] = torch.from_numpy(generator.permuted(shuffles[:, at].numpy(), axis=1))
    return shuffles


def largest_cosine(lm: LanguageModel, vectors: Tensor, permuted: Tensor) -> dict[str, Any]:
    """The largest cosine of a class's direction (classes, d) with a token, against permuted ones (sets, classes, d)."""
    every = torch.cat([vectors[None], permuted])
    largest = largest_cosines(every.flatten(0, 1), lm.readout).view(len(every), -1).amax(-1).double().numpy()
    return {
        "cosine": largest[0],
        "shuffled_cosine_95": np.quantile(largest[1:], 0.95),
        "p": permutation_p(largest[0], largest[1:]),
        "shuffles": len(permuted),
    }


def reported_direction(lm: LanguageModel, states: Tensor, params: Params) -> dict[str, Any]:
    """The originals' projection: multiply-against-add probe direction at the lens layer, scores ``W_U . v``."""
    row = row_at(params.logit_lens.depth, lm.n_layers)
    y = torch.tensor(labelled(REPORTED["symbol"])[1])
    coef = as_reported(states[row : row + 1], y, C=params.probing.C).coef[0]
    direction = (coef[0] - coef[1])[None]
    words = [*OPERATIONS, "+", "-"]
    ids = [[word_tokens(word, lm.tokenizer).strict_id] for word in words]
    up, down = (project(sign * direction, lm.readout, ids, cosine=False, top=30) for sign in (1, -1))
    return {
        "layer": lm.layers[row],
        "vocabulary": len(lm.readout.weight),
        "words": words,
        "score": up.score[0],
        "rank": up.rank[0],
        "rank_from_bottom": down.rank[0],
        "top_tokens": [token_text(lm.tokenizer, int(i)) for i in up.top_ids[0]],
        "bottom_tokens": [token_text(lm.tokenizer, int(i)) for i in down.top_ids[0]],
    }


def words_of_directions(
    lm: LanguageModel, directions: Tensor, targets: Sequence[WordTokens], null: Sequence[Sequence[WordTokens]]
) -> dict[str, Any]:
    """Cosine, rank and p of each operation word with its class's direction, for (layers, operations, d).

    ``over_layers`` judges the largest cosine over layers as a maximum. None for a layer whose states do not differ
    between classes (the embedding of "="): rounding is no direction.
    """
    size = directions.norm(dim=-1).amax(1)
    skipped = (size <= 1e-6 * size.max()).tolist()
    n_layers, n_ops = directions.shape[:2]
    words = [word.ids for group in (targets, *null) for word in group]
    projection = project(directions.flatten(0, 1), lm.readout, words, cosine=True, top=5)
    parts = [n_ops, *map(len, null)]
    score, rank = (values.view(n_layers, n_ops, -1).split(parts, -1) for values in (projection.score, projection.rank))
    own = torch.arange(n_ops)
    cosine, ranks = (values[0][:, own, own] for values in (score, rank))
    null_score, null_rank = ([values[1 + o][:, o] for o in range(n_ops)] for values in (score, rank))
    p = np.stack([permutation_p(cosine[:, o], null_score[o]) for o in range(n_ops)], axis=-1)
    blocks = [row for row in range(layer_row(0), n_layers) if not skipped[row]]
    over_layers = [p_over_layers(cosine[blocks, o].numpy(), null_score[o][blocks].numpy()) for o in range(n_ops)]
    table = {
        "cosine": cosine,
        "rank": ranks,
        "p": p,
        "smallest_p": p.min(-1),  # a minimum over four operations: compare it with alpha / 4
        "best_rank": ranks.amin(-1),
        "null_rank_median": torch.stack([values.double().quantile(0.5, dim=-1) for values in null_rank], dim=-1),
        "max_cosine": projection.top_scores[:, 0].view(n_layers, n_ops),
        "top_tokens": [
            [[token_text(lm.tokenizer, int(i)) for i in ids] for ids in row]
            for row in projection.top_ids.view(n_layers, n_ops, -1)
        ],
    }
    by_layer = {
        key: [None if skip else row for row, skip in zip(rows, skipped, strict=True)] for key, rows in table.items()
    }
    return {**by_layer, "over_layers": {"p": over_layers, "smallest_p": min(over_layers)}}


if __name__ == "__main__":
    main(run, __doc__)
