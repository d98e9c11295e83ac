"""Learning rate and sparsity weight by step; fractions of the whole run, so they need no finished store."""


def decayed_lr(lr: float, step: int, steps: int, decay_fraction: float) -> float:
    """lr of step 0 ≤ step < steps: constant, then linear towards 0; the last step still moves.

    SAELens' `lr_decay_steps` with lr_end = 0.
    """
    decay = round(steps * decay_fraction)
    return lr * min(1.0, (steps - step) / decay) if decay else lr


def warmed(step: int, steps: int, warmup_fraction: float) -> float:
    """Part of a coefficient that counts at a step: 0 at the first, linear up to 1, then 1."""
    warmup = round(steps * warmup_fraction)
    return min(1.0, step / warmup) if warmup else 1.0
