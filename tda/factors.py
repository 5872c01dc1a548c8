"""The EK-FAC factors of a segment: their file, and what they are turned into, curvature for SOURCE and projections for rows."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tda.artifacts import damaged, existing, whole
from tda.ekfac import EKFAC
from tda.model import Layer
from tda.preconditioner import Curvature, DiagonalCurvature, LayerCurvature, plain, scalar
from tda.projection import Projection, random_projections


@dataclass(frozen=True)
class SegmentFactors:
    """EK-FAC factors of every tracked layer of one segment.

    In projected space they are factors of projected gradients, and `projections` says how to project.
    """

    layers: list[Layer]
    plain: dict[str, EKFAC]  # of gradients G, by layer; empty if they are yet to be fitted from stored rows
    scaled: dict[str, EKFAC]  # of P^(1/2) G, by layer; empty unless `curvature.adam` is symmetric
    P: dict[str, Tensor]  # the optimizer's preconditioner by layer, averaged over the checkpoints; empty for SGD
    projections: dict[str, Projection]  # by layer; empty in full space
    num_documents: int  # on which they were fitted

    def curvature(self, adam: str) -> dict[str, Curvature]:
        """What SOURCE applies to a query, by layer. `adam` says how P enters: none, scalar, symmetric or diagonal.

        Raises:
            ValueError: the factors were fitted without what `adam` needs.
        """
        if adam == "none" or not self.P:
            return {name: plain(factors) for name, factors in self.plain.items()}
        if adam == "scalar":
            return {name: scalar(factors, self.P[name]) for name, factors in self.plain.items()}
        if adam == "diagonal":
            return {name: DiagonalCurvature(factors, self.P[name]) for name, factors in self.plain.items()}
        if not self.scaled:
            raise ValueError(
                "curvature.adam: symmetric was asked for, but these factors were fitted without; run `dvc repro curvature`"
            )
        return {name: LayerCurvature(factors, self.P[name].sqrt()) for name, factors in self.scaled.items()}

    def row_projections(self, *, kind: str, rank: int, seed: int) -> dict[str, Projection]:
        """How a gradient becomes a stored row.

        "eigenbasis": on each side, the eigenvectors with the largest corrected eigenvalues; "pca": the leading eigenvectors of
        the covariance (LoGra's PCA initialisation); "random": random orthonormal. Factors in projected space have projections
        already, and these are returned.
        """
        if self.projections:
            return self.projections
        if kind == "random":
            return random_projections(self.layers, rank=rank, seed=seed)
        projections = {}
        for layer in self.layers:
            factors = self.plain[layer.name]
            if kind == "pca":
                projections[layer.name] = Projection(factors.Q_A[:, :rank].contiguous(), factors.Q_S[:, :rank].contiguous())
            else:
                # The input of a group is projected once, so its layers share a choice, by the eigenvalues of all of them.
                shared = sum(self.plain[other.name].Lambda.sum(dim=0) for other in self.layers if other.group == layer.group)
                P_i, P_o = _leading(factors.Q_A, shared, rank), _leading(factors.Q_S, factors.Lambda.sum(dim=1), rank)
                projections[layer.name] = Projection(P_i, P_o)
        return projections


def _leading(Q: Tensor, eigenvalues: Tensor, rank: int) -> Tensor:
    return Q[:, eigenvalues.argsort(descending=True, stable=True)[:rank]].contiguous()


def save_factors(path: Path, factors: SegmentFactors) -> None:
    """Write `factors` to `path`; an input side that layers share is written once.

    Raises:
        ValueError: a factor is not finite.
    """
    tensors = {}
    for layer in factors.layers:
        for kind, held in (("plain", factors.plain), ("scaled", factors.scaled)):
            if layer.name in held:
                shared = layer.group if kind == "plain" else layer.name
                tensors[f"{kind}.Q_A.{shared}"] = held[layer.name].Q_A
                tensors[f"{kind}.Q_S.{layer.name}"] = held[layer.name].Q_S
                tensors[f"{kind}.Lambda.{layer.name}"] = held[layer.name].Lambda
        if layer.name in factors.P:
            tensors[f"P.{layer.name}"] = factors.P[layer.name]
        if layer.name in factors.projections:
            tensors[f"P_i.{layer.group}"] = factors.projections[layer.name].P_i
            tensors[f"P_o.{layer.name}"] = factors.projections[layer.name].P_o
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"curvature: {bad[0]} is not finite; likely the checkpoint has diverged: look at the training loss")
    facts = {"layers": [asdict(layer) for layer in factors.layers], "num_documents": factors.num_documents}
    metadata = {"factors": json.dumps(facts)}  # a single key, since safetensors writes several in an order that varies
    with whole(path) as part:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)


def load_factors(path: Path) -> SegmentFactors:
    """The factors in `path`; a missing file is refused with FileNotFoundError."""
    try:
        with safe_open(existing(path, stage="curvature"), "pt") as file:
            facts = json.loads(file.metadata()["factors"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(damaged(path, error, stage="curvature")) from error
    layers = [Layer(**values) for values in facts["layers"]]

    def held(kind: str) -> dict[str, EKFAC]:
        return {
            layer.name: EKFAC(
                tensors[f"{kind}.Q_A.{layer.group if kind == 'plain' else layer.name}"],
                tensors[f"{kind}.Q_S.{layer.name}"],
                tensors[f"{kind}.Lambda.{layer.name}"],
            )
            for layer in layers
            if f"{kind}.Lambda.{layer.name}" in tensors
        }

    return SegmentFactors(
        layers=layers,
        plain=held("plain"),
        scaled=held("scaled"),
        P={layer.name: tensors[f"P.{layer.name}"] for layer in layers if f"P.{layer.name}" in tensors},
        projections={
            layer.name: Projection(tensors[f"P_i.{layer.group}"], tensors[f"P_o.{layer.name}"])
            for layer in layers
            if f"P_o.{layer.name}" in tensors
        },
        num_documents=facts["num_documents"],
    )
