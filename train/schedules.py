"""Learning rate and sparsity weight by step; fractions of the whole run, so they need no finished store."""


def decayed_lr(lr: float, step: int, steps: int, decay_fraction: float) -> float:
    """lr of step 0 ≤ step < steps: constant, then linear towards 0; the last step still moves.

    SAELens' `lr_decay_steps` with lr_end = 0.
    """
    decay = round(steps * decay_fraction)
    return lr * min(1.0, (steps - step) / decay) if decay else lr


def warmed_l1(l1_coefficient: float, step: int, steps: int, warmup_fraction: float) -> float:
    """λ of a step: 0 at the first, linear up to the full value, then constant."""
    warmup = round(steps * warmup_fraction)
    return l1_coefficient * min(1.0, step / warmup) if warmup else l1_coefficient
