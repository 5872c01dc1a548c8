"""Means of a model's weights over the steps of training."""

import torch
from torch import Tensor, nn

from tda.losses import at_least_float32
from tda.model import moving_state


class RunningMean:
    """Sums the weights that training changes, in float32 or wider; `take` gives their mean since it was last called."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = list(moving_state(model))
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self) -> None:
        """Include the current weights in the mean."""
        self._count += 1
        state = self._model.state_dict()
        for name in self._names:
            value = state[name]
            if not value.is_floating_point():
                continue
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = at_least_float32(value.detach().clone())

    def take(self) -> dict[str, Tensor]:
        """The mean by name; starts a new one."""
        means = {name: value / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
