"""The parts of SCott, each switched off or changed alone (arXiv 2403.01505, ablations in 2 steps)."""

from __future__ import annotations

from layton.reproduce.ablation import Setting, measure_table
from layton.reproduce.claim import Context
from layton.reproduce.report import Outcome

SETTINGS = (
    Setting("whole", "SCott: ER-SDE, h = 3, LoRA discriminator, averaged target", "MJHQ FID 24.9"),
    Setting("ode", "an ODE solver in place of the SDE"),
    Setting("eta", "DDIM with eta 0.2 in place of ER-SDE"),
    Setting("one_move", "one teacher step, h = 1", "MJHQ FID 27.2"),
    Setting("no_critic", "no discriminator"),
    Setting("full_critic", "a discriminator of all weights", "COCO FID 23.5, against 21.9 with LoRA"),
    Setting("unconditional", "a discriminator that sees neither text nor time"),
    Setting("no_target", "no averaged target"),
)


def measure(context: Context) -> Outcome:
    """Measure the table."""
    title, source = "SCott part by part, 2 steps", "arXiv 2403.01505, ablations"
    return measure_table("scott_ablation", title, source, SETTINGS, context, steps=2)
