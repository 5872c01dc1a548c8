"""Many small networks of one shape, trained together: parameters are stacked along a first axis, and each has its own batches."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tda.recipe import MLPModel, Training

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


def make_mlp(shape: MLPModel) -> nn.Sequential:
    """A network of that shape with torch's default initialisation, from torch's global generator, in eval mode."""
    layers: list[nn.Module] = []
    for d_in, d_out in zip(shape.dims, shape.dims[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), ACTIVATIONS[shape.activation]()]
    return nn.Sequential(*layers[:-1]).eval()


class ModelStack(nn.Module):
    """Copies of MLPs of one shape. Takes (model * example, input), model by model, and gives (model * example, output)."""

    def __init__(self, models: Sequence[nn.Sequential]):
        super().__init__()
        self.num_models = len(models)
        self._models = list(models)
        layers = list(zip(*map(_linears, models), strict=True))
        self.weights = nn.ParameterList([torch.stack([copy.weight.detach() for copy in layer]) for layer in layers])
        self.biases = nn.ParameterList([torch.stack([copy.bias.detach() for copy in layer]) for layer in layers])
        self.activation = next((module for module in models[0] if not isinstance(module, nn.Linear)), nn.Identity())

    def forward(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """The outputs of every model on its own share of the rows."""
        h = x.unflatten(0, (self.num_models, -1))
        for layer, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b[:, None], self.activation(h) if layer else h, W.mT)
        return h.flatten(0, 1)

    @torch.no_grad()
    def unstacked(self) -> list[nn.Sequential]:
        """The networks that were stacked, with the weights of now."""
        for index, model in enumerate(self._models):
            for linear, W, b in zip(_linears(model), self.weights, self.biases, strict=True):
                linear.weight.copy_(W[index])
                linear.bias.copy_(b[index])
        return self._models


def _linears(model: nn.Sequential) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]


class StackOptimizer:
    """`torch.optim.SGD` or `torch.optim.AdamW` on stacked parameters, with a learning rate for every model.

    A rate of 0 leaves a model as it is, so that models with fewer steps can wait for the others.
    """

    def __init__(self, parameters: Sequence[Tensor], training: Training):
        self._parameters = list(parameters)
        self._training = training
        self._momentum = [torch.zeros_like(parameter) for parameter in parameters]
        self._second_moments = [torch.zeros_like(parameter) for parameter in parameters if training.optimizer == "adamw"]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rates: Float[Tensor, " model"]) -> None:
        """Move every model along its gradient."""
        self._steps += 1
        if self._training.optimizer == "sgd":
            self._sgd(gradients, rates)
        else:
            self._adamw(gradients, rates)

    def _sgd(self, gradients: Sequence[Tensor], rates: Float[Tensor, " model"]) -> None:
        beta, wd = self._training.momentum, self._training.weight_decay
        for theta, g, m in zip(self._parameters, gradients, self._momentum, strict=True):
            m.mul_(beta).add_(g).add_(theta, alpha=wd)
            theta.sub_(_by_model(rates, theta) * m)

    def _adamw(self, gradients: Sequence[Tensor], rates: Float[Tensor, " model"]) -> None:
        (beta1, beta2), eps, wd = self._training.betas, self._training.eps, self._training.weight_decay
        unbias1, unbias2 = 1 - beta1**self._steps, 1 - beta2**self._steps
        for theta, g, m, v in zip(self._parameters, gradients, self._momentum, self._second_moments, strict=True):
            eta = _by_model(rates, theta)
            theta.mul_(1 - eta * wd)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = v.sqrt().div_(math.sqrt(unbias2)).add_(eps)
            theta.sub_(eta / unbias1 * m / denominator)


def _by_model(rates: Float[Tensor, " model"], like: Tensor) -> Tensor:
    return rates.reshape(-1, *[1] * (like.ndim - 1))
