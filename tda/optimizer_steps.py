"""Optimizer steps as functions of a state, and how derivatives are pulled back through them.

`step(state, G, rate, number, optimizer)` is the state after step `number` (from 1), where G is the gradient of the step's loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tda.trajectory import Optimizer

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class State:
    """What a step changes; or, with a leading axis of queries, the derivatives of their costs in it."""

    weights: Weights
    first: Weights  # SGD's velocity, AdamW's mean gradient
    second: Weights  # AdamW's mean squared gradient; empty for SGD

    def __getitem__(self, part: slice) -> "State":
        """A view of the queries in `part`."""
        return State(*({name: value[part] for name, value in held.items()} for held in self._parts))

    @property
    def _parts(self) -> tuple[Weights, Weights, Weights]:
        return self.weights, self.first, self.second


PullBack = Callable[[State], Weights]


def sgd_step(state: State, G: Weights, rate: float, number: int, optimizer: Optimizer) -> State:
    """`torch.optim.SGD`, operation for operation: v' = momentum v + (G + decay x), x' = x - rate v'."""
    velocity = {
        name: (state.first[name] * optimizer.momentum).add_(g.add(state.weights[name], alpha=optimizer.decay(name)))
        for name, g in G.items()
    }
    return State({name: state.weights[name].add(velocity[name], alpha=-rate) for name in G}, velocity, {})


def sgd_pull_back(after: State, G: Weights, rate: float, number: int, optimizer: Optimizer) -> PullBack:
    """For `sgd_step`: a function that turns derivatives `q` by the state after the step into those by the state before, in place.

    What passes through the gradient is not included: the function returns the derivatives by the gradient instead.
    """

    def pull_back(q: State) -> Weights:
        g = {name: q.first[name].add(q.weights[name], alpha=-rate) for name in G}
        for name in G:
            q.weights[name].add_(g[name], alpha=optimizer.decay(name))
            torch.mul(g[name], optimizer.momentum, out=q.first[name])
        return g

    return pull_back


def adamw_step(state: State, G: Weights, rate: float, number: int, optimizer: Optimizer) -> State:
    """`torch.optim.AdamW`, operation for operation; epsilon stands outside the root."""
    correction1, correction2 = _corrections(number, optimizer)
    first = {name: state.first[name].lerp(g, 1 - optimizer.beta1) for name, g in G.items()}
    second = {name: (state.second[name] * optimizer.beta2).addcmul_(g, g, value=1 - optimizer.beta2) for name, g in G.items()}
    weights = {
        name: (state.weights[name] * (1 - rate * optimizer.decay(name))).addcdiv_(
            first[name], _denominator(second[name], correction2, optimizer), value=-rate / correction1
        )
        for name in G
    }
    return State(weights, first, second)


def adamw_pull_back(after: State, G: Weights, rate: float, number: int, optimizer: Optimizer) -> PullBack:
    """For `adamw_step`, as `sgd_pull_back`.

    The root of the second moment has no derivative at 0. But there every gradient so far was 0, so the first moment is 0 too,
    and the quotient m / (sqrt(v) + epsilon), as a function of those gradients, has the derivative of m / epsilon: what goes
    through the root is exactly 0, not infinity times 0.
    """
    correction1, correction2 = _corrections(number, optimizer)
    by_first, by_second = {}, {}  # derivatives of the new weight in the new moments
    for name, v in after.second.items():
        D = _denominator(v, correction2, optimizer)
        root = (v * correction2).sqrt()
        slope = torch.where(v > 0, 0.5 / torch.where(v > 0, root, 1), 0)  # of D in v
        by_first[name] = -rate / correction1 / D
        by_second[name] = -by_first[name] * after.first[name] / D * slope

    def pull_back(q: State) -> Weights:
        g = {}
        for name in G:
            q.first[name].addcmul_(q.weights[name], by_first[name])
            q.second[name].addcmul_(q.weights[name], by_second[name])
            g[name] = q.first[name] * (1 - optimizer.beta1)
            g[name].addcmul_(q.second[name], G[name], value=2 * (1 - optimizer.beta2))
            q.first[name].mul_(optimizer.beta1)
            q.second[name].mul_(optimizer.beta2)
            q.weights[name].mul_(1 - rate * optimizer.decay(name))
        return g

    return pull_back


def _corrections(number: int, optimizer: Optimizer) -> tuple[float, float]:
    return 1 - optimizer.beta1**number, 1 - optimizer.beta2**number


def _denominator(v: Tensor, correction: float, optimizer: Optimizer) -> Tensor:
    return (v.sqrt() / correction**0.5).add_(optimizer.epsilon)


STEPS = {"sgd": sgd_step, "adamw": adamw_step}
PULL_BACKS = {"sgd": sgd_pull_back, "adamw": adamw_pull_back}
