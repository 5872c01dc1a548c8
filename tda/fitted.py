"""A run of any model with everything that attribution methods need of it, each computed when first used and then kept.

This is the in-memory counterpart of the pipeline's artifacts: the same segments, factors and SOURCE, but gradients are computed
when they are needed instead of read from a store. Everything runs on the device of the run's model.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tda.counterfactual import Retrain, Retraining, retrained
from tda.data import Batch, Data, Documents, Examples, TensorBatch, batch_plan, batches
from tda.ekfac import Diagonal, squared_gradients
from tda.factors import SegmentFactors
from tda.fit_factors import fit_factors
from tda.ggn import Product, gauss_newton_product, queries_at_once
from tda.gradients import check_gradients, check_losses, gradient_dots, gradient_squares, query_gradients
from tda.model import EVERY_LAYER, Layer, embedding_layers, layer_matrix, parameter_name, tracked_layers, what_is_left_out
from tda.preconditioner import LayerCurvature, plain, preconditioner_of, scaled_diagonal
from tda.segments import (
    Segment,
    document_exposure,
    draw_shares,
    effective_learning_rates,
    make_segments,
    rows_seen,
    segment_ends,
)
from tda.source import Gradients, SegmentDynamics
from tda.task import Task
from tda.trajectory import Run

CHECKED_ROWS = 8  # on which a model's losses and gradients are looked at
VALUES_AT_ONCE = 2**23  # values in the largest tensor of a Gauss-Newton product, over the queries that are multiplied together

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
FromZero = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountFromZero = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Settings:
    """Settings of the methods. A name in front of a comment says which method reads it; the others are for all."""

    num_segments: Count = 3
    segments_by: Literal["steps", "learning_rate"] = "steps"
    weights: Literal["last", "mean"] = "last"  # a checkpoint's own weights, or their mean over the steps since the one before
    layers: str = EVERY_LAYER  # which linear layers are tracked: a regular expression that matches the whole name
    adam: Literal["scalar", "symmetric", "diagonal", "none"] = "scalar"  # how AdamW enters the curvature (`preconditioner.py`)
    damping: Positive = 0.1  # ekfac_influence: in mean eigenvalues of each layer
    counterfactual_end: Share = 0.5  # averaged_influence, surrogate: steps of a retraining / the run
    damping_scale: FromZero = 4.0  # averaged_influence: its damping in units of 1/(eta_bar K)
    rounds: Count = 3  # averaged_influence: rounds of block Krylov
    solver_terms: CountFromZero = 8192  # averaged_influence: terms of the loss in the Gauss-Newton matrix; 0: all
    ridge_scale: FromZero = 0.0  # surrogate: in 2/(eta_bar K) + weight decay; 0: 2.5 for a classifier, 1 for a regression
    splits: CountFromZero = 0  # surrogate: random splits of the rows into halves; 0: 4 for a classifier, 16 for a regression
    retrainings: CountFromZero = 100  # datamodel: on random halves of the rows, in pairs
    prior: str = ""  # datamodel: the method whose scores it corrects; "": the most accurate one for the task
    curvature_examples: CountFromZero = 0  # rows on which EK-FAC is fitted; 0: all
    iterations: CountFromZero = 0  # of a solver; 0: 20 of conjugate gradients, 200 of the stochastic ones
    solver_damping: FromZero = 0.0  # cg, lissa, astra: in the unit of the curvature; 0: as training implies
    solver_examples: CountFromZero = 512  # cg, lissa, source_cg: rows in the Gauss-Newton matrix; 0: all
    projection_size: Count = 512  # trak: values of a projected gradient
    batch_size: CountFromZero = 0  # tokens (documents) or examples in a batch; 0: 4096 or 256
    seed: CountFromZero = 0
    workers: Count = 1  # processes that fit curvature

    @classmethod
    def of(cls, *, origin: str = "attribute", **settings: object) -> "Settings":
        """Settings by name; numbers may be text. Messages begin with `origin`.

        Raises:
            ValueError: a setting is unknown, or its value is not allowed.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{origin}: unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"{origin}: {first['loc'][0]}: {first['msg'][0].lower() + first['msg'][1:]}; got {first['input']!r}"
            ) from error


class Fitted:
    """A run, its task, its training data and queries, and what methods compute from them.

    With `embeddings`, their matrices count among the layers, as far as they can be followed; of these, curvature is diagonal.
    `factors` are the EK-FAC factors of every segment, in full space, if they are there already.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        train: Data,
        queries: Data,
        settings: Settings,
        *,
        retrain: Retrain | None = None,
        embeddings: bool = False,
        factors: Sequence[SegmentFactors] = (),
    ):
        self._retrain, self._with_embeddings, self._given = retrain, embeddings, factors
        self.run, self.task, self.settings = run.at_least_float32(), task, settings
        self.device = next(self.run.model.parameters()).device
        self.train, self.queries = (
            data.at_least_float32().to(self.device) if isinstance(data, Examples) else data for data in (train, queries)
        )
        for name, data in (("the training data", self.train), ("the queries", self.queries)):
            if isinstance(data, Examples):
                data.check_finite(f"attribute: {name}")
        largest = max((int(rows.max()) for rows in run.batches if len(rows)), default=-1)
        if largest >= len(train):
            raise ValueError(
                f"attribute: the run saw row {largest}, the training data have {len(train)} rows; expected the data of the run, "
                "in the order of its row numbers"
            )
        rates = run.learning_rates
        if not rates.sum() > 0:
            raise ValueError(
                f"attribute: the learning rates of the run's {len(rates)} steps sum to {rates.sum():g}; expected a run "
                "that has learned something; record it before a scheduler changes the rate"
            )
        self.batch_size = settings.batch_size or (4096 if isinstance(train, Documents) else 256)

    @cached_property
    def layers(self) -> list[Layer]:
        """The tracked layers, embeddings last. Warns if much of the model is not tracked, unless `layers` chose it so."""
        return [*self._linear, *self._embeddings]

    @cached_property
    def _linear(self) -> list[Layer]:
        model = self.model(-1)
        layers = tracked_layers(model, self.settings.layers, probe=self._probe)
        rows = self._few_rows()
        losses = check_losses(model, (self._batch([row]) for row in rows), self._batch(rows), task=self.task)
        check_gradients(model, layers, self._batch(rows), counted=int(losses.argmax()), task=self.task)
        said = what_is_left_out(model, layers) if self.settings.layers == EVERY_LAYER else ""
        if said:
            warnings.warn(f"attribute: {said}", stacklevel=2)
        return layers

    @cached_property
    def _embeddings(self) -> list[Layer]:
        """The embeddings with gradients that can be told apart by example; others are left out, as those of positions."""
        model, batch = self.model(-1), self._batch(self._few_rows())
        found = embedding_layers(model, self.settings.layers) if self._with_embeddings else []
        counted = int(self.task.losses(model, batch)[1].argmax()) if found else 0

        def can_be_followed(layer: Layer) -> bool:
            try:
                return layer.name in check_gradients(model, [layer], batch, counted=counted, task=self.task)
            except ValueError:
                return False

        return list(filter(can_be_followed, found))

    def _probe(self, model: nn.Module) -> object:
        return self.task.losses(model, self._batch([0]))

    def _few_rows(self) -> list[int]:
        """A few rows from all over the training data, no more than fit into a batch, if these are two."""
        num = min(CHECKED_ROWS, len(self.train), max(2, self.batch_size // int(self.train.lengths.max())))
        return np.linspace(0, len(self.train) - 1, num).astype(int).tolist()

    def _batch(self, rows: Sequence[int]) -> Batch | TensorBatch:
        return self.train.batch(rows).to(self.device)

    def model(self, checkpoint: int) -> nn.Module:
        """The model at a checkpoint; -1 is the last one."""
        return self.run.at(checkpoint, mean=self.settings.weights == "mean")

    @property
    def adam(self) -> str:
        """How AdamW enters the curvature; none for SGD."""
        return self.settings.adam if self.run.optimizer.kind == "adamw" else "none"

    @cached_property
    def shares(self) -> np.ndarray:
        """(row,) the share of the run's draws that each row got."""
        return draw_shares(self.run.batches, len(self.train))

    @property
    def final(self) -> int:
        """The index of the last checkpoint."""
        return len(self.run.checkpoints) - 1

    @cached_property
    def rates(self) -> np.ndarray:
        """(step,) effective learning rates."""
        optimizer = self.run.optimizer
        return effective_learning_rates(self.run.trajectory, optimizer=optimizer.kind, momentum=optimizer.momentum)

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments of the run, first to last."""
        steps = [checkpoint.step for checkpoint in self.run.checkpoints]
        ends = segment_ends(steps, self.settings.num_segments, by=self.settings.segments_by, rates=self.rates, stage_ends=[])
        exposure = self._exposure([steps[end - 1] for end in ends])
        return make_segments(steps, ends, rates=self.rates, exposure=exposure, tokens=self.train.num_loss_tokens)

    @cached_property
    def exposure(self) -> np.ndarray:
        """(row, segment): the share of the segment's learning rate that the row received."""
        return self._exposure([segment.last_step for segment in self.segments])

    def _exposure(self, last_steps: list[int]) -> np.ndarray:
        if not self.run.batches:
            return np.full((len(self.train), len(last_steps)), 1 / len(self.train))
        return document_exposure(self.run.trajectory, last_steps, rates=self.rates, num_documents=len(self.train))

    @cached_property
    def query_gradients(self) -> Gradients:
        """Full gradients of the queries' mean cost per term at the last checkpoint."""
        return self.query_gradients_at(-1)

    def query_gradients_at(self, checkpoint: int, queries: Data | None = None) -> Gradients:
        """Full gradients of the mean cost per term of the queries, or of these, at a checkpoint, in the queries' order."""
        queries = self.queries if queries is None else queries
        held, order = query_gradients(self.model(checkpoint), self.layers, self._in_batches(queries), task=self.task)
        place = torch.from_numpy(np.argsort(order)).to(self.device)
        finite = torch.stack([G.flatten(1).isfinite().all(dim=1) for G in held.values()]).all(dim=0)[place]
        if not finite.all():
            bad = [queries.ids[query] for query in np.flatnonzero(~finite.cpu().numpy())[:5]]
            raise ValueError(
                f"attribute: the gradients of {int((~finite).sum())} of {len(finite)} queries are not finite, such as "
                f"{', '.join(bad)}; expected finite inputs and costs; leave them out, or look for a diverged run"
            )
        return {name: G[place] for name, G in held.items()}

    def batches(self) -> Iterator:
        """The training data in batches of similar length."""
        return self._in_batches(self.train)

    def _in_batches(self, data: Data) -> Iterator:
        return (batch.to(self.device) for batch in batches(data, batch_tokens=self.batch_size))

    def _batches_of(self, rows: np.ndarray) -> list[Batch | TensorBatch]:
        plan = batch_plan(self.train.lengths[rows], batch_tokens=self.batch_size)
        return [self._batch(rows[chosen].tolist()) for chosen in plan]

    def dot(self, checkpoint: int, queries: Gradients, data: Data | None = None) -> np.ndarray:
        """(row, query) dot products of `queries` with the gradients of the summed losses of all training rows, or of `data`."""
        model = self.model(checkpoint)
        dots = np.zeros((len(self.train if data is None else data), len(next(iter(queries.values())))))
        for batch in self.batches() if data is None else self._in_batches(data):
            dots[batch.rows] = gradient_dots(model, self.layers, batch, task=self.task, queries=queries).double().cpu().numpy()
        return dots

    def norms(self, checkpoint: int) -> np.ndarray:
        """(row,) norms of the gradients of every training row's summed loss at a checkpoint."""
        model = self.model(checkpoint)
        squares = np.zeros(len(self.train))
        for batch in self.batches():
            squares[batch.rows] = gradient_squares(model, self.layers, batch, task=self.task).double().cpu().numpy()
        return np.sqrt(squares)

    @cached_property
    def factors(self) -> list[SegmentFactors]:
        """EK-FAC of every segment, with the preconditioner at its checkpoints."""
        if not self._given:
            return [self.segment_factors(segment, segment.checkpoints) for segment in self.segments]
        return [
            replace(held, P=self.preconditioner(segment.checkpoints))
            for segment, held in zip(self.segments, self._given, strict=True)
        ]

    def segment_factors(self, segment: Segment, checkpoints: list[int]) -> SegmentFactors:
        """EK-FAC averaged over `checkpoints`, on rows that the segment trained on."""
        seen = self._seen(segment, self.settings.curvature_examples)
        return fit_factors(
            checkpoints,
            self.model,
            self.train.select(seen),
            task=self.task,
            pattern=self.settings.layers,
            weight=1 / segment.tokens_per_document,
            P=self.preconditioner(checkpoints),
            adam=self.adam,
            projections=None,
            batch_tokens=self.batch_size,
            seed=self.settings.seed * 1000 + segment.index,
            workers=self.settings.workers,
            device=self.device,
            packed=self.device.type != "cpu",
        )

    def _seen(self, segment: Segment, num: int, *salt: int) -> np.ndarray:
        """`num` of the rows that the segment trained on; 0: all of them."""
        return rows_seen(self.exposure, segment.index, num, seed=[self.settings.seed, segment.index, *salt])

    def product(self, segment: Segment, checkpoints: list[int]) -> Product:
        """Products with the segment's Gauss-Newton matrix: the mean over `checkpoints`, on a fixed set of its rows."""
        batches = self._batches_of(self._seen(segment, self.settings.solver_examples))
        products = [self._product(segment, self.model(checkpoint), batches) for checkpoint in checkpoints]

        def mean(v: Tensor) -> Tensor:
            return sum(product(v) for product in products) / len(products)

        return lambda v: torch.cat([mean(block) for block in v.split(self.queries_at_once)])

    def retrained(self, trainings: Sequence[Retraining]) -> Iterator[nn.Module]:
        """A model for every training: by the user's `retrain` if there is one, else by repeating the run's steps.

        Raises:
            ValueError: `retrain` gives another number of models, or the run cannot be repeated.
        """
        if self._retrain is None:
            yield from retrained(self.run, self.task, self.train, trainings)
            return
        num_models = 0
        for model in self._retrain(trainings):
            num_models += 1
            yield model.eval()
        if num_models != len(trainings):
            raise ValueError(f"attribute: retrain gave {num_models} models for {len(trainings)} trainings; expected one for each")

    @property
    def queries_at_once(self) -> int:
        """How many queries are multiplied together: as many as keep the tangents nearly in the processor's cache."""
        positions = max(self.batch_size, int(self.train.lengths.max()))
        return queries_at_once(self._linear, positions=positions, values=VALUES_AT_ONCE)

    def stochastic_products(self, segment: Segment, checkpoint: int) -> Callable[[int], Product]:
        """For every number k, products with the Gauss-Newton matrix of a random batch of rows (of `batch_size`)."""
        model = self.model(checkpoint)
        num = max(1, round(self.batch_size / self.train.lengths.mean()))

        def drawn(number: int) -> Product:
            return self._product(segment, model, [self._batch(self._seen(segment, num, number).tolist())])

        return drawn

    def _product(self, segment: Segment, model: nn.Module, batches: list) -> Product:
        return gauss_newton_product(model, self.layers, batches, task=self.task, weight=1 / segment.tokens_per_document)

    def preconditioner(self, checkpoints: list[int]) -> dict[str, Tensor]:
        """AdamW's P by layer, (d_out, d_in), averaged over checkpoints; empty if it does not enter the curvature."""
        if self.adam == "none":
            return {}
        each = [self.second_moments(index) for index in checkpoints]
        epsilon = self.run.optimizer.epsilon
        return {
            layer.name: sum(preconditioner_of(v[layer.name], epsilon=epsilon) for v in each) / len(each) for layer in self.layers
        }

    def second_moments(self, index: int) -> dict[str, Tensor]:
        """AdamW's bias-corrected second moments at a checkpoint, by layer, (d_out, d_in); a layer without is a ValueError."""
        checkpoint = self.run.checkpoints[index]
        v, correction = checkpoint.second_moments, checkpoint.bias_correction(self.run.optimizer)

        def matrix(layer: Layer) -> Tensor:
            weight, bias = (v.get(parameter_name(layer.name, kind)) for kind in ("weight", "bias"))
            if weight is None or (layer.bias and bias is None):
                raise ValueError(
                    f"attribute: {layer.name} has no second moments at step {checkpoint.step}, or at another that is averaged "
                    "with it; expected those of every layer at every checkpoint; if it was not trained from the start, leave it "
                    "out by the pattern of layers (`layers` of `attribute`)"
                )
            return layer_matrix(self.run.model.get_submodule(layer.name), weight, bias)

        return {layer.name: matrix(layer).cpu() / correction for layer in self.layers}

    @cached_property
    def dynamics(self) -> list[SegmentDynamics]:
        """What every segment does to a query."""
        return [
            SegmentDynamics(
                segment.index,
                held.curvature(self.adam) | self._embedding_curvature(segment, held.P),
                segment.time,
                self.run.optimizer.weight_decay,
            )
            for segment, held in zip(self.segments, self.factors, strict=True)
        ]

    def _embedding_curvature(self, segment: Segment, P: dict[str, Tensor]) -> dict[str, LayerCurvature]:
        """The curvature of embeddings on the rows that solvers use, averaged over the segment's checkpoints."""
        if not self._embeddings:
            return {}
        rows = self._seen(segment, self.settings.solver_examples)
        generator = torch.Generator(self.device).manual_seed(self.settings.seed * 1000 + segment.index)
        held: dict[str, LayerCurvature] = {}
        each = [
            squared_gradients(
                self.model(checkpoint), self._embeddings, self._batches_of(rows), task=self.task, generator=generator
            )
            for checkpoint in segment.checkpoints
        ]
        weight = 1 / (segment.tokens_per_document * len(rows) * len(each))
        for layer in self._embeddings:
            H = Diagonal(sum(sums[layer.name] for sums in each).cpu() * weight)
            held[layer.name] = scaled_diagonal(H, P[layer.name]) if P else plain(H)
        return held
