"""Scalar functions of curvature eigenvalues; every method is one of them.

`s` are eigenvalues (not negative), `time` is `eta_bar K`, the segment's summed learning rate, `w` the weight decay.
SOURCE, arXiv 2405.12186, section 3 and appendix D; weight decay: it adds to every eigenvalue.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SpectralFn = Callable[[Tensor], Tensor]


def segment_decay(time: float, *, weight_decay: float = 0.0) -> SpectralFn:
    """F_S(s) = exp(-time (s + w)): how much of a perturbation is left after the segment."""
    return lambda s: torch.exp(-time * (s.clamp_min(0) + weight_decay))


def segment_response(time: float, *, weight_decay: float = 0.0) -> SpectralFn:
    """F_r(s) = (1 - exp(-time (s + w))) / (s + w), which tends to `time` as s + w tends to 0."""

    def response(s: Tensor) -> Tensor:
        rate = s.clamp_min(0) + weight_decay
        exponent = time * rate
        flat = exponent < torch.finfo(s.dtype).eps  # below it the quotient is `time` to the last bit
        return torch.where(flat, torch.full_like(s, time), -torch.expm1(-exponent) / torch.where(flat, torch.ones_like(s), rate))

    return response


def damped_inverse(damping: float) -> SpectralFn:
    """1 / (s + damping): influence functions.

    Raises:
        ValueError: `damping` is not positive, so that a zero eigenvalue would divide by zero.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}; set scores.damping")
    return lambda s: 1 / (s.clamp_min(0) + damping)
