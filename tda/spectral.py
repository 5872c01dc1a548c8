"""The scalar functions of curvature eigenvalues by which influence functions and SOURCE differ.

`s` is an eigenvalue (at least 0), `time` is `eta_bar K` (a segment's summed learning rate), and `w` is the weight decay, which
adds to every eigenvalue. F_S and F_r: SOURCE, arXiv 2405.12186, section 3 and appendix D.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SpectralFn = Callable[[Tensor], Tensor]


def segment_decay(time: float, *, weight_decay: float = 0.0) -> SpectralFn:
    """F_S(s) = exp(-time (s + w)): the part of a perturbation that is left at the end of the segment."""
    return lambda s: torch.exp(-time * (s.clamp_min(0) + weight_decay))


def segment_response(time: float, *, weight_decay: float = 0.0) -> SpectralFn:
    """F_r(s) = (1 - exp(-time (s + w))) / (s + w): the effect of a gradient that acts throughout; `time` where s + w is 0."""

    def response(s: Tensor) -> Tensor:
        rate = s.clamp_min(0) + weight_decay
        exponent = time * rate
        flat = exponent < torch.finfo(s.dtype).eps  # here the quotient equals `time` to the last bit
        return torch.where(flat, torch.full_like(s, time), -torch.expm1(-exponent) / torch.where(flat, torch.ones_like(s), rate))

    return response


def damped_inverse(damping: float) -> SpectralFn:
    """1 / (s + damping): influence functions.

    Raises:
        ValueError: `damping` is not positive; a zero eigenvalue would then divide by zero.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}; set scores.damping")
    return lambda s: 1 / (s.clamp_min(0) + damping)
