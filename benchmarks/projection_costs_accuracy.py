"""Claim: a store of 4 KB a document keeps nine tenths of what full gradients know, if its bits go where scores come from.

On a bank of real retrainings, the full-rank answer of `averaged_influence` (responses of the queries, gradients of the rows at
the same weights) is scored again from rows that were projected and rounded, and its LDS set against bytes per document:
projections, ranks, types, how the room is shared among layers. What is kept is chosen from training rows alone, as queries in
place of the bank's; measurements are read only to score. Prints tables; writes JSON and a plot.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.compression import MOST_BITS, Quantiser, allotted_bits, largest_coordinates, largest_rectangles
from tda.artifacts import write_json
from tda.averaged_influence import around
from tda.bank import Bank, ceiling, load_bank
from tda.bank_scores import RunStore
from tda.data import Documents
from tda.evaluation_plots import BASELINE, COLOURS, DASHES, INK, MUTED, figure
from tda.fit_factors import fit_factors
from tda.fitted import Fitted, Settings
from tda.ggn import pack
from tda.gradients import gradient_rows
from tda.iterative import block_krylov
from tda.lds import lds_by_query, mean_over_queries
from tda.projection import Projection, random_projections
from tda.rank_correlation import spearman
from tda.solve import DampedCurvature, respond
from tda.source import Gradients
from tda.spectral import damped_inverse
from tda.text_table import text_table
from tda.trajectory import Run, at_mean

RANKS = (4, 8, 16, 32, 64)
BUDGETS = tuple(2**power for power in range(8, 16))  # bytes a document
TARGET, KEPT = 4096, 0.9
PSEUDO_QUERIES = 32
PCA_COORDINATES = 8192  # of the eigenbasis, that principal components are combinations of
FACTOR_RANKS = (16,)
IDEAL, SMALLEST_IDEAL = "bound of independent coordinates, half-whitened", 1024
BATCH_SIZES = {True: 1024, False: 64}  # tokens of documents, or examples: full gradients of as many rows are held


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True, help="as `tda evaluate lds` reads it")
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "evaluate", help="where recorded runs are kept and made")
    parser.add_argument("--seeds", type=int, default=1, help="runs")
    parser.add_argument("--json", type=Path, help="default: WORK/BANK-projection.json; the plot is beside it")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bank = load_bank(chosen.bank)
    store = RunStore(bank.data, bank.recipe, chosen.work)
    result = summary(bank, [measure(bank, recorded(store, seed), seed) for seed in range(chosen.seeds)], chosen.bank.stem)
    print(render(result))
    path = chosen.json or chosen.work / f"{chosen.bank.stem}-projection.json"
    write_json(path, result)
    plot(result, path.with_suffix(".png"))
    print(f"\njson     {path}\nplot     {path.with_suffix('.png')}")


def recorded(store: RunStore, seed: int) -> Run:
    """The run of `seed`, made if it is not there."""
    try:
        return store.run(seed)
    except FileNotFoundError:
        store.train([seed])
        return store.run(seed)


# the full-rank answer


class Answer:
    """The full-rank answer: everything in the curvature's eigenbasis, layers side by side."""

    def __init__(self, run: Run, bank: Bank, settings: Settings):
        train, queries = bank.data.train(bank.recipe), bank.data.queries(bank.recipe)
        rows = math.ceil(settings.solver_terms / train.num_loss_tokens.mean())
        batch_size = BATCH_SIZES[isinstance(train, Documents)]
        settings = replace(settings, num_segments=1, solver_examples=rows, batch_size=batch_size)
        steps = [checkpoint.step for checkpoint in run.checkpoints]
        self.place = Fitted(at_mean(run, around(steps, settings.counterfactual_end)), bank.recipe.task, train, queries, settings)
        (self.segment,), (dynamics,), (self.factors,) = self.place.segments, self.place.dynamics, self.place.factors
        self.layers, self.basis = self.place.layers, self.factors.plain
        damping = dynamics.weight_decay + settings.damping_scale / self.segment.time
        self.curvature = DampedCurvature.of(self.layers, dynamics.curvature, dict.fromkeys(dynamics.curvature, damping))
        self.damping = {name: damping / float(held.root_P.square()) for name, held in dynamics.curvature.items()}
        self.root_P = {name: held.root_P for name, held in dynamics.curvature.items()}
        self.received = self.place.exposure[:, 0] / self.segment.tokens_per_document
        self.product = self.place.product(self.segment, self.segment.checkpoints)
        self.model = self.place.model(-1)
        self.responses = self.solved(self.place.query_gradients)

    def solved(self, gradients: Gradients) -> Tensor:
        """(query, coordinate) responses, by block Krylov."""

        def solve(curvature: DampedCurvature, q: Tensor) -> Tensor:
            rounds = self.place.settings.rounds
            return block_krylov(curvature.times(self.product), q, precondition=curvature.approximate_inverse, rounds=rounds)

        return self.rotated(respond(gradients, self.curvature, solve, queries_at_once=len(next(iter(gradients.values())))))

    def rotated(self, gradients: Gradients) -> Tensor:
        """(query, coordinate) of full gradients."""
        return pack({name: self.basis[name].Q_S.T @ G @ self.basis[name].Q_A for name, G in gradients.items()}, self.layers)

    @cached_property
    def pseudo_responses(self) -> Tensor:
        """Responses of training rows, drawn at random, as queries."""
        rows = np.random.default_rng(self.place.settings.seed).choice(len(self.place.train), PSEUDO_QUERIES, replace=False)
        place = self.place
        pseudo = Fitted(place.run, place.task, place.train, place.train.select(np.sort(rows)), place.settings)
        pseudo.layers = self.layers
        return self.solved(pseudo.query_gradients)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """(coordinate,)."""
        return pack({name: held.Lambda for name, held in self.basis.items()}, self.layers)

    @cached_property
    def whitening(self) -> Tensor:
        """(coordinate,) (Lambda + damping)^(-1/2): half of the curvature's inverse."""
        return pack(
            {name: held.Lambda.clamp_min(0) + self.damping[name] for name, held in self.basis.items()}, self.layers
        ).rsqrt()

    @cached_property
    def layer_of(self) -> Tensor:
        """(coordinate,) the number of its layer."""
        return torch.repeat_interleave(
            torch.arange(len(self.layers)), torch.tensor([layer.d_out * layer.d_in for layer in self.layers])
        )

    def rows(self) -> Iterator[tuple[list[int], Tensor]]:
        """Row numbers and (row, coordinate) gradients, a batch at a time."""
        sides = {name: Projection(held.Q_A, held.Q_S) for name, held in self.basis.items()}
        for batch in self.place.batches():
            G, _losses = gradient_rows(self.model, self.layers, batch, task=self.place.task, projections=sides)
            yield batch.rows, G

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """(coordinate,) mean and mean square of the rows' gradients."""
        total, squares = torch.zeros(len(self.layer_of)), torch.zeros(len(self.layer_of))
        for _rows, G in self.rows():
            total += G.sum(dim=0)
            squares += G.square_().sum(dim=0)
        return total / len(self.place.train), squares / len(self.place.train)

    @cached_property
    def contributions(self) -> dict[str, Tensor]:
        """(coordinate,) E[u^2] E[g^2], with u of pseudo-queries that were solved, or of all rows by EK-FAC; and eigenvalues."""
        mean, squares = self.moments
        varying = (squares - mean.square()).clamp_min(0)
        return {
            "solved": self.pseudo_responses.square().mean(dim=0) * varying,
            "ekfac": squares * self.whitening.pow(4) * varying,
            "eigenvalues": self.eigenvalues.clamp_min(0),
        }

    def sample(self, coordinates: Tensor, half: int) -> Tensor:
        """(row, chosen) gradients of every other row."""
        return torch.cat([
            G[[place for place, row in enumerate(rows) if row % 2 == half]][:, coordinates] for rows, G in self.rows()
        ])


# ways to store a row


@dataclass(frozen=True)
class Scheme:
    """A way to store a row: its values are a linear map of the gradient, then rounded."""

    label: str
    kind: str
    num_bytes: int
    values: Callable[[Tensor], Tensor]  # (row, coordinate) to (row, value)
    queries: Tensor  # (query, value)
    rounded: Callable[[Tensor], Tensor]
    centre: Tensor | float = 0.0  # subtracted before rounding; what it gives a query is added without loss
    half: int | None = None  # only rows with this remainder by 2: the others were fitted on


def float16(values: Tensor) -> Tensor:
    largest = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return (values / largest).half().to(values.dtype) * largest


def largest_of_groups(values: Tensor, groups: Tensor) -> Tensor:
    largest = values.new_zeros(len(values), int(groups.max()) + 1)
    return largest.scatter_reduce_(1, groups.expand_as(values), values.abs(), "amax").clamp_min(1e-30)


def int8(groups: Tensor) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        scales = (largest_of_groups(values, groups) / 127)[:, groups]
        return (values / scales).round() * scales

    return rounded


def signs(groups: Tensor) -> Callable[[Tensor], Tensor]:
    def rounded(values: Tensor) -> Tensor:
        counts = torch.bincount(groups).clamp_min(1)
        means = values.new_zeros(len(values), len(counts)).index_add_(1, groups, values.abs()) / counts
        return values.sign() * means[:, groups]

    return rounded


def low_rank(shapes: Sequence[tuple[int, int]], rank: int) -> Callable[[Tensor], Tensor]:
    """LoRIF (arXiv 2601.21929): of every layer's block the best approximation of low rank, its factors in 8 bits."""

    def rounded(values: Tensor) -> Tensor:
        kept = []
        for block, shape in zip(values.split([rows * columns for rows, columns in shapes], dim=1), shapes, strict=True):
            U, s, Vh = torch.linalg.svd(block.unflatten(1, shape), full_matrices=False)
            left, right = (U * s[:, None].sqrt())[..., :rank].mT, (Vh * s[..., None].sqrt())[:, :rank]
            left, right = (
                int8(torch.zeros(side.shape[2], dtype=torch.long))(side.flatten(0, 1)).view_as(side) for side in (left, right)
            )
            kept.append((left.mT @ right).flatten(1))
        return torch.cat(kept, dim=1)

    return rounded


def water_level(variances: Tensor, num_bits: float) -> float:
    """The distortion D at which independent normal variables take so many bits: the sum of log2(v/D)/2 where v is above D."""
    low, high = 0.0, float(variances.max())
    for _halving in range(60):
        level = (low + high) / 2
        above = (variances / level).clamp_min(1).log2().sum() / 2 > num_bits
        low, high = (level, high) if above else (low, level)
    return high


def coded(quantiser: Quantiser) -> Callable[[Tensor], Tensor]:
    return lambda values: quantiser.decode(*quantiser.encode(values))


DTYPES = ("fp32", "fp16", "int8, scale per row", "int8, scale per layer", "1 bit, scale per layer")


def typed(dtype: str, groups: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Rounding of values to `dtype` and bytes of a row."""
    num, scales = len(groups), 2 * len(groups.unique())
    whole = torch.zeros_like(groups)
    return {
        "fp32": (lambda values: values, 4 * num),
        "fp16": (float16, 2 * num),
        "int8, scale per row": (int8(whole), num + 2),
        "int8, scale per layer": (int8(groups), num + scales),
        "1 bit, scale per layer": (signs(groups), -(-num // 8) + scales),
    }[dtype]


def coordinates_in(num_bytes: int, dtype: str, answer: Answer) -> int:
    """How many values of `dtype` fit."""
    bits = {"fp16": 16, "1 bit, scale per layer": 1}.get(dtype, 8)
    scales = {"fp16": 0, "int8, scale per row": 2}.get(dtype, 2 * len(answer.layers))
    return min(max(8 * (num_bytes - scales) // bits, 0), len(answer.layer_of))


class Schemes:
    """Everything that is tried on one answer."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.mean, self.squares = answer.moments
        self.variance = (self.squares - self.mean.square()).clamp_min(1e-30)

    def chosen(
        self, places: Tensor, dtype: str, *, label: str, kind: str, whitened: bool = False, centred: bool = True
    ) -> Scheme:
        """Some coordinates of the eigenbasis as they are or half-whitened, in one type."""
        answer = self.answer
        scale = answer.whitening[places] if whitened else torch.ones(len(places))
        rounded, num_bytes = typed(dtype, answer.layer_of[places])
        return Scheme(
            label,
            kind,
            num_bytes,
            lambda R: R[:, places] * scale,
            answer.responses[:, places] / scale,
            rounded,
            self.mean[places] * scale if centred else 0.0,
        )

    def allotted(self, num_bytes: int, *, by: str, kind: str) -> Scheme | None:
        """Coordinates in as many bits each as their contribution asks for."""
        answer = self.answer
        num_bits = min(8 * num_bytes - 16 * len(answer.layers), 8 * len(answer.layer_of))
        if num_bits < 8:
            return None
        bits = allotted_bits(answer.contributions[by], num_bits)
        places = bits.nonzero()[:, 0]
        _layers, groups = answer.layer_of[places].unique(return_inverse=True)
        quantiser = Quantiser(bits[places], self.variance[places].sqrt(), groups)
        return Scheme(
            f"{kind}, {num_bytes} B",
            kind,
            quantiser.num_bytes,
            lambda R: R[:, places],
            answer.responses[:, places],
            coded(quantiser),
            self.mean[places],
        )

    def projected(self, projections: dict[str, Projection], dtype: str, *, label: str, kind: str) -> Scheme:
        """LoGra rows, raw."""
        answer = self.answer
        inside = {
            name: Projection(answer.basis[name].Q_A.T @ held.P_i, answer.basis[name].Q_S.T @ held.P_o)
            for name, held in projections.items()
        }
        sizes = [layer.d_out * layer.d_in for layer in answer.layers]

        def values(R: Tensor) -> Tensor:
            blocks = zip(R.split(sizes, dim=1), answer.layers, strict=True)
            return torch.cat(
                [inside[layer.name].apply(block.unflatten(1, (layer.d_out, layer.d_in))).flatten(1) for block, layer in blocks],
                dim=1,
            )

        groups = torch.repeat_interleave(
            torch.arange(len(answer.layers)), torch.tensor([inside[layer.name].size for layer in answer.layers])
        )
        rounded, num_bytes = typed(dtype, groups)
        return Scheme(label, kind, num_bytes, values, values(answer.responses), rounded, values(self.mean[None])[0])

    def rank_places(self, kind: str, rank: int) -> Tensor:
        """The coordinates of the projections that `SegmentFactors.row_projections` makes of eigenvectors."""
        answer = self.answer
        places, start = [], 0
        for layer in answer.layers:
            Lambda = answer.basis[layer.name].Lambda
            outputs, inputs = torch.arange(layer.d_out)[:rank], torch.arange(layer.d_in)[:rank]
            if kind == "eigenbasis":
                shared = sum(answer.basis[other.name].Lambda.sum(dim=0) for other in answer.layers if other.group == layer.group)
                inputs = shared.argsort(descending=True, stable=True)[:rank]
                outputs = Lambda.sum(dim=1).argsort(descending=True, stable=True)[:rank]
            places.append(start + (outputs[:, None] * layer.d_in + inputs).flatten())
            start += Lambda.numel()
        return torch.cat(places)

    def rectangle_places(self, num: int, by: str = "ekfac") -> Tensor:
        """The coordinates of rectangles whose ranks are shared among layers by contribution."""
        answer = self.answer
        sizes = [layer.d_out * layer.d_in for layer in answer.layers]
        held = {
            layer.name: part.view(layer.d_out, layer.d_in)
            for layer, part in zip(answer.layers, answer.contributions[by].split(sizes), strict=True)
        }
        inputs, outputs = largest_rectangles(held, {layer.name: layer.group for layer in answer.layers}, num)
        starts = np.cumsum([0, *sizes])
        return torch.cat([
            int(start) + (outputs[layer.name][:, None] * layer.d_in + inputs[layer.group]).flatten()
            for start, layer in zip(starts, answer.layers, strict=False)
        ])

    def ideal(self, num_bytes: int, *, kind: str) -> Scheme:
        """What no code surpasses that takes half-whitened coordinates for independent normal variables (rate-distortion bound).

        A coordinate of variance v comes out of such a code as (1 - D/v) of itself and noise of variance D (1 - D/v), D being
        the water level (Cover and Thomas, section 10.3).
        """
        answer = self.answer
        variance = self.variance * answer.whitening.square()
        left = 1 - (water_level(variance, 8 * num_bytes) / variance).clamp_max(1)
        noise = (left * (1 - left) * variance).sqrt()
        random = torch.Generator().manual_seed(0)

        def out_of_the_code(values: Tensor) -> Tensor:
            length = (values.square().sum(dim=1, keepdim=True) / variance.sum()).sqrt()  # of the row, in that of all rows
            return left * values + length * noise * torch.randn(values.shape, generator=random)

        return Scheme(
            f"{kind}, {num_bytes} B",
            kind,
            num_bytes,
            lambda R: R * answer.whitening,
            answer.responses / answer.whitening,
            out_of_the_code,
            self.mean * answer.whitening,
        )

    def sketched(self, num_bytes: int, *, share: float, kind: str) -> Scheme:
        """The largest coordinates, and of all that is left a count sketch: discarded directions are damped, not dropped."""
        answer = self.answer
        num = num_bytes - 4
        kept = largest_coordinates(answer.contributions["ekfac"], round(share * num))
        buckets = num - len(kept)
        random = torch.Generator().manual_seed(0)
        bucket = torch.randint(buckets, (len(answer.layer_of),), generator=random)
        sign = torch.randint(2, (len(answer.layer_of),), generator=random) * 2.0 - 1
        sign[kept] = 0.0

        def values(R: Tensor, scale: Tensor) -> Tensor:
            sketch = R.new_zeros(len(R), buckets).index_add_(1, bucket, R * (scale * sign))
            return torch.cat([R[:, kept] * scale[kept], sketch], dim=1)

        groups = (torch.arange(num) >= len(kept)).long()
        return Scheme(
            f"{kind}, {num_bytes} B",
            kind,
            num_bytes,
            lambda R: values(R, answer.whitening),
            values(answer.responses, 1 / answer.whitening),
            int8(groups),
            values(self.mean[None], answer.whitening)[0],
        )

    def low_ranks(self, rank: int, inner: int, *, kind: str) -> Scheme:
        """LoRIF in the largest `rank` directions of each side, half-whitened."""
        answer = self.answer
        places = self.rank_places("eigenbasis", rank)
        shapes = [(min(rank, layer.d_out), min(rank, layer.d_in)) for layer in answer.layers]
        num_bytes = sum(inner * (rows + columns + 4) for rows, columns in shapes)
        scale = answer.whitening[places]
        return Scheme(
            f"rank {inner} of {rank} x {rank}",
            kind,
            num_bytes,
            lambda R: R[:, places] * scale,
            answer.responses[:, places] / scale,
            low_rank(shapes, inner),
        )

    def principal(self, half: int, *, kind: str) -> list[Scheme]:
        """Principal components of the largest coordinates together, across layers, in as many bits as their variance asks for.

        Rows and responses are scaled to the same second moments first, so that one set of components serves both sides. Fitted
        on one half of the rows, for the other.
        """
        answer = self.answer
        kept = largest_coordinates(answer.contributions["ekfac"], min(PCA_COORDINATES, len(answer.layer_of)))
        u_squares = self.squares[kept] * answer.whitening[kept].pow(4)
        scale = (u_squares / self.variance[kept]).pow(0.25)
        sample = (answer.sample(kept, half) - self.mean[kept]) * scale
        values, vectors = torch.linalg.eigh((sample @ sample.T).double())
        positive = values > 1e-6 * values[-1]
        components = (sample.T @ vectors[:, positive].float()) * values[positive].rsqrt().float()
        variance = (values[positive] / len(sample)).float()
        schemes = []
        for num_bytes in BUDGETS:
            bits = allotted_bits(variance.square(), min(8 * num_bytes - 16, 8 * len(variance)))
            places = bits.nonzero()[:, 0]
            quantiser = Quantiser(bits[places], variance[places].sqrt(), torch.zeros(len(places), dtype=torch.long))
            down = components[:, places]
            schemes.append(
                Scheme(
                    f"{kind}, {num_bytes} B",
                    kind,
                    quantiser.num_bytes,
                    lambda R, down=down: (R[:, kept] * scale) @ down,
                    (answer.responses[:, kept] / scale) @ down,
                    coded(quantiser),
                    (self.mean[kept] * scale) @ down,
                    half=1 - half,
                )
            )
            if bits.min() == MOST_BITS:
                break
        return schemes

    def in_projected_space(self, rank: int, kind: str) -> list[Scheme]:
        """EK-FAC fitted on projected gradients, and its full-space answer projected; both in float32."""
        answer, place = self.answer, self.answer.place
        projections = (
            random_projections(answer.layers, rank=rank, seed=0)
            if kind == "random"
            else answer.factors.row_projections(kind=kind, rank=rank, seed=0)
        )
        fitted = fit_factors(
            answer.segment.checkpoints,
            place.model,
            place.train,
            task=place.task,
            pattern=place.settings.layers,
            weight=1 / answer.segment.tokens_per_document,
            P={},
            adam="none",
            projections=lambda _layers: projections,
            batch_tokens=place.batch_size,
            seed=place.settings.seed,
            workers=1,
            device=torch.device("cpu"),
        )
        full = {
            name: held.apply(damped_inverse(answer.damping[name]), place.query_gradients[name])
            for name, held in answer.basis.items()
        }
        inside = torch.cat(
            [
                fitted
                .plain[layer.name]
                .apply(
                    damped_inverse(answer.damping[layer.name]), projections[layer.name].apply(place.query_gradients[layer.name])
                )
                .flatten(1)
                for layer in answer.layers
            ],
            dim=1,
        )
        outside = torch.cat([projections[layer.name].apply(full[layer.name]).flatten(1) for layer in answer.layers], dim=1)
        like = self.projected(projections, "fp32", label="", kind="factors")
        return [
            replace(like, label=f"EK-FAC in {space} space, {kind}, rank {rank}", queries=queries, centre=0.0)
            for space, queries in (("full", outside), ("projected", inside))
        ]

    def all(self) -> list[Scheme]:
        """Every way that is tried, with labels of their own."""
        answer = self.answer
        everything = torch.arange(len(answer.layer_of))
        schemes = [
            self.chosen(
                everything, dtype, label=f"all coordinates, {dtype}{', half-whitened' * whitened}", kind="all", whitened=whitened
            )
            for dtype, whitened in (
                ("int8, scale per layer", False),
                ("1 bit, scale per layer", False),
                ("1 bit, scale per layer", True),
            )
        ]
        for rank in RANKS:
            for seed in (0, 1):
                projections = random_projections(answer.layers, rank=rank, seed=seed)
                label = f"random, rank {rank}, fp16{', other seed' * seed}"
                schemes.append(self.projected(projections, "fp16", label=label, kind="random fp16" if not seed else "other seed"))
            for kind in ("pca", "eigenbasis"):
                label = f"{kind}, rank {rank}, fp16"
                schemes.append(self.chosen(self.rank_places(kind, rank), "fp16", label=label, kind=f"{kind} fp16"))
        for rank in (8, 16):
            for dtype in DTYPES:
                for whitened in (False, True):
                    label = f"eigenbasis, rank {rank}, {dtype}{', half-whitened' * whitened}"
                    places = self.rank_places("eigenbasis", rank)
                    schemes.append(self.chosen(places, dtype, label=label, kind="dtypes", whitened=whitened))
        schemes += self._at_budgets()
        schemes += [self.low_ranks(rank, inner, kind="LoRIF") for rank, inner in ((16, 1), (16, 2), (32, 1), (32, 2))]
        for half in (0, 1):
            schemes += self.principal(half, kind="components, bits by contribution")
        for rank in FACTOR_RANKS:
            for kind in ("random", "pca", "eigenbasis"):
                schemes += self.in_projected_space(rank, kind)
        return schemes

    def _at_budgets(self) -> list[Scheme]:
        answer, schemes = self.answer, []
        for num_bytes in BUDGETS:
            for dtype, whitened in (
                ("fp16", False),
                ("int8, scale per layer", False),
                ("int8, scale per layer", True),
                ("1 bit, scale per layer", False),
                ("1 bit, scale per layer", True),
            ):
                num = coordinates_in(num_bytes, dtype, answer)
                kind = f"coordinates {dtype.split(',')[0]}{', half-whitened' * whitened}"
                if num:
                    places = largest_coordinates(answer.contributions["ekfac"], num)
                    schemes.append(self.chosen(places, dtype, label=f"{kind}, {num_bytes} B", kind=kind, whitened=whitened))
            num = coordinates_in(num_bytes, "int8, scale per layer", answer)
            if len(answer.layers) <= num <= 2**14:
                kind = "rectangles int8, half-whitened"
                places = self.rectangle_places(num)
                dtype = "int8, scale per layer"
                schemes.append(self.chosen(places, dtype, label=f"{kind}, {num_bytes} B", kind=kind, whitened=True))
            schemes.append(self.allotted(num_bytes, by="ekfac", kind="coordinates, bits by contribution"))
            if num_bytes >= SMALLEST_IDEAL:
                schemes.append(self.ideal(num_bytes, kind=IDEAL))
        for by in ("solved", "eigenvalues"):
            places = largest_coordinates(answer.contributions[by], coordinates_in(TARGET, "int8, scale per layer", answer))
            label = f"coordinates int8, half-whitened, chosen by {by}, {TARGET} B"
            schemes.append(self.chosen(places, "int8, scale per layer", label=label, kind="choices", whitened=True))
        schemes.append(self.allotted(TARGET, by="solved", kind="coordinates, bits by contribution (solved)"))
        for dtype, whitened in (("int8, scale per layer", True), ("1 bit, scale per layer", True)):
            places = largest_coordinates(answer.contributions["ekfac"], coordinates_in(TARGET, dtype, answer))
            label = f"coordinates {dtype.split(',')[0]}, half-whitened, mean kept in, {TARGET} B"
            schemes.append(self.chosen(places, dtype, label=label, kind="choices", whitened=whitened, centred=False))
        schemes += [
            self.sketched(TARGET, share=share, kind=f"int8, {1 - share:.0%} for a sketch of the rest")
            for share in (0.5, 0.75, 0.9)
        ]
        return [scheme for scheme in schemes if scheme is not None]


# measuring


def measure(bank: Bank, run: Run, seed: int) -> dict:
    """What every way to store rows keeps of one run's answer."""
    answer = Answer(run, bank, Settings.of(seed=1000 * seed))
    schemes = Schemes(answer).all()
    mean, _squares = answer.moments
    constant = answer.responses @ mean
    num_rows, num_queries = len(answer.place.train), len(answer.responses)
    full = np.zeros((num_rows, num_queries))
    found = {scheme.label: np.zeros((num_rows, num_queries), np.float32) for scheme in schemes}
    for rows, R in answer.rows():
        full[rows] = (R @ answer.responses.T).numpy()
        for scheme in schemes:
            values = scheme.rounded(scheme.values(R) - scheme.centre) @ scheme.queries.T
            scores = (values + constant if isinstance(scheme.centre, Tensor) else values).numpy()
            places = [place for place, row in enumerate(rows) if scheme.half in (None, row % 2)]
            found[scheme.label][[rows[place] for place in places]] = scores[places]
    received = answer.received[:, None]
    reference = lds_by_query((full * received).T, bank.masks, bank.costs)
    return {
        "full": reference,
        "full_bytes": 4 * len(answer.layer_of),
        "coordinates": len(answer.layer_of),
        "schemes": {
            scheme.label: {
                "kind": scheme.kind,
                "bytes": scheme.num_bytes,
                "lds": lds_by_query((found[scheme.label] * received).T, bank.masks, bank.costs),
                "rank_correlation": spearman(found[scheme.label] * received, full * received).mean(),
            }
            for scheme in schemes
        },
        "seeds_agree": {
            str(rank): spearman(
                found[f"random, rank {rank}, fp16"] * received, found[f"random, rank {rank}, fp16, other seed"] * received
            ).mean()
            for rank in RANKS
        },
    }


def summary(bank: Bank, runs: Sequence[dict], name: str) -> dict:
    """Means over runs; intervals over queries."""
    full = np.mean([run["full"] for run in runs], axis=0)

    def scheme(label: str) -> dict:
        held = [run["schemes"][label] for run in runs]
        lds = np.mean([one["lds"] for one in held], axis=0)
        return {
            "kind": held[0]["kind"],
            "bytes": round(float(np.mean([one["bytes"] for one in held]))),
            "lds": vars(mean_over_queries(lds)),
            "kept": float(lds.mean() / full.mean()),
            "minus_full": vars(mean_over_queries(lds - full)),
            "rank_correlation": float(np.mean([one["rank_correlation"] for one in held])),
        }

    labels = [label for label in runs[0]["schemes"] if all(label in run["schemes"] for run in runs)]
    return {
        "claim": "projection_costs_accuracy",
        "bank": name,
        "ceiling": ceiling(bank),
        "runs": len(runs),
        "coordinates": runs[0]["coordinates"],
        "full": {"bytes": runs[0]["full_bytes"], "lds": vars(mean_over_queries(full))},
        "schemes": {label: scheme(label) for label in labels},
        "random_seeds_agree": {
            rank: float(np.mean([run["seeds_agree"][rank] for run in runs])) for rank in runs[0]["seeds_agree"]
        },
    }


def render(result: dict) -> str:
    """The result as tables for a terminal."""
    full = result["full"]
    lines = [
        f"{result['bank']}: averaged_influence from full rows ({full['bytes'] / 2**10:,.0f} KB a document in float32): LDS "
        f"{_interval(full['lds'])}, {result['runs']} run{'s' * (result['runs'] > 1)}",
        "",
    ]
    rows = [
        [label, f"{held['bytes']:,}", _interval(held["lds"]), f"{held['kept']:.1%}", f"{held['rank_correlation']:.3f}"]
        for label, held in result["schemes"].items()
    ]
    lines.append(text_table(["stored", "bytes", "LDS", "of full", "rank correlation"], rows))
    lines += [
        "",
        text_table(
            ["random projections", "agreement of two seeds"],
            [[f"rank {rank}", f"{value:.3f}"] for rank, value in result["random_seeds_agree"].items()],
        ),
    ]
    return "\n".join(lines)


def _interval(value: dict) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


CURVES = {  # kind: words
    IDEAL: "bound: independent normal coordinates",
    "components, bits by contribution": "principal components, bits by contribution",
    "coordinates, bits by contribution": "coordinates, bits by contribution",
    "coordinates 1 bit, half-whitened": "coordinates, 1 bit, half-whitened",
    "coordinates int8, half-whitened": "coordinates, int8",
    "rectangles int8, half-whitened": "ranks shared among layers, int8",
    "eigenbasis fp16": "equal ranks, eigenbasis, fp16",
    "pca fp16": "equal ranks, PCA, fp16",
    "random fp16": "equal ranks, random, fp16",
}
LOOKS = [(INK, (0, (1, 1)))] + [(colour, "-") for colour in COLOURS[:5]] + [(BASELINE, dashes) for dashes in ("-", *DASHES)]


def plot(result: dict, path: Path) -> None:
    """LDS against bytes per document, a line for each way to store rows."""
    full, size = result["full"]["lds"]["mean"], result["full"]["bytes"] / 2**10
    runs = f"{result['runs']} run{'s' * (result['runs'] > 1)}"
    with figure(
        path,
        width=8.4,
        height=4.4,
        title=f"What is left of a score, by bytes per document: {result['bank']}",
        subtitle=f"LDS from stored rows, mean over queries and {runs}; full rows take {size:,.0f} KB in float32",
    ) as axes:
        for (kind, words), (colour, dashes) in zip(CURVES.items(), LOOKS, strict=True):
            held = sorted((one["bytes"], one["lds"]["mean"]) for one in result["schemes"].values() if one["kind"] == kind)
            if held:
                sizes, values = zip(*held, strict=True)
                axes.plot(sizes, values, color=colour, linestyle=dashes, linewidth=2, marker="o", markersize=4, label=words)
        axes.axhline(full, color=INK, linewidth=1)
        axes.axhline(KEPT * full, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.axvline(TARGET, color=MUTED, linewidth=1, linestyle=(0, (1, 1.5)))
        for height, words in ((full, "full rows"), (KEPT * full, f"{KEPT:.0%} of it")):
            axes.annotate(
                words,
                (1.0, height),
                (-3, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=8,
                color=INK,
                ha="right",
            )
        axes.set_xscale("log", base=2)
        axes.set_xlim(220, 2**18.4)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda size, _place: f"{size:.0f} B" if size < 2**10 else f"{size / 2**10:.0f} KB")
        )
        axes.set_xlabel("stored bytes per document")
        axes.set_ylabel("LDS")
        axes.tick_params(length=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, borderaxespad=0)


if __name__ == "__main__":
    main(sys.argv[1:])
