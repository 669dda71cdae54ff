"""Stage figures: the paper's figures from the results, as SVG (which the paper shows) and PNG."""

from collections.abc import Callable

from matplotlib.figure import Figure

from experiments.params import load_params
from experiments.report.figures import arithmetic, drawing, mixtures, other_tasks, reinforcement, training
from experiments.shared.stage import exit_on_bad_input, results_of

FIGURES: dict[Callable[..., Figure], tuple[str, ...]] = {
    arithmetic.probe_depth: ("probing",),
    arithmetic.alignment_null: ("logit_lens",),
    arithmetic.lens_heatmap: ("logit_lens",),
    training.dual_reward_steps: ("dual_reward",),
    training.dual_reward_arms: ("dual_reward",),
    training.fine_tuning_depth: ("lora_sft", "cot_alignment"),
    training.fine_tuning_answers: ("cot_alignment",),
    other_tasks.other_tasks: ("other_tasks",),
    reinforcement.grpo_steps: ("grpo",),
    reinforcement.grpo_depth: ("grpo",),
    reinforcement.collapse_map: ("collapse",),
    reinforcement.staged: ("staged",),
    mixtures.router_maxima: ("moe_routers",),
    mixtures.routing_load: ("moe_routers",),
    mixtures.routing_domains: ("moe_routers",),
    mixtures.routing_layers: ("moe_routers",),
    mixtures.mixture_lens: ("moe_routers",),
}
"""Function that draws a figure of its name -> the stages whose results it draws."""


def run() -> None:
    """Draw and write every figure."""
    params = load_params()
    for draw, stages in FIGURES.items():
        drawing.write(draw, *(results_of(stage, params) for stage in stages))


if __name__ == "__main__":
    exit_on_bad_input(run)
