"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state.

"cosine" (arXiv 1608.03983) and "linear" decay to a floor over the whole run, "wsd" holds the peak and decays in the
last part (warmup-stable-decay, arXiv 2404.06395), "constant" stays at the peak. All begin with a linear warm-up.
"""

import math

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def learning_rate_factor(
    step: int, *, schedule: str, total_steps: int, warmup_steps: int = 0, decay_steps: int = 0, floor: float = 0.0
) -> float:
    """Multiplier of the peak learning rate at a step.

    Args:
        step: 0 for the first optimizer step.
        schedule: one of ``SCHEDULES``.
        total_steps: steps of the run.
        warmup_steps: steps of the linear rise; step s gives (s + 1) / warmup_steps.
        decay_steps: length of the last part of "wsd"; it falls linearly to ``floor``, reached at ``total_steps``.
        floor: factor at the end of "cosine", "linear" and "wsd".

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule in ("cosine", "linear"):
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        left = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return floor + (1.0 - floor) * left
    decay_start = total_steps - decay_steps
    if step < decay_start or decay_steps == 0:
        return 1.0
    return 1.0 + (floor - 1.0) * min(1.0, (step - decay_start) / decay_steps)
