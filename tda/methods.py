"""Attribution methods, each a function of a fitted run that gives (query, row) scores: positive helps the query.

Scores of SOURCE, influence functions, surrogate, datamodel and replay are the predicted rise of the query's mean cost per term
when the row is left out of training; those of the others have no unit. `a+b` names the ensemble of two methods, or of more.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tda.averaged_influence import averaged_influence_scores
from tda.baselines import random_scores, token_bm25_scores
from tda.data import Data, Documents, Examples
from tda.datamodel import posterior, retrain_on_halves
from tda.fitted import Fitted
from tda.ggn import Product, pack
from tda.influence import precondition
from tda.iterative import conjugate_gradients, descend, largest_eigenvalue
from tda.preconditioner import DiagonalCurvature, plain
from tda.replay import replay_scores
from tda.scores import ENSEMBLE, cosines, ensemble, source_values
from tda.solve import DampedCurvature, SolvedDynamics, Solver, respond
from tda.source import SegmentDynamics
from tda.surrogate import surrogate_scores
from tda.task import Classification, Regression, Task
from tda.trajectory import averaged
from tda.trak import Sketch, features, trak_scores

Method = Callable[[Fitted], np.ndarray]


def gradient_dot(run: Fitted) -> np.ndarray:
    """Dot products of gradients at the last checkpoint (Charpiat et al. 2019)."""
    return run.dot(run.final, run.query_gradients).T


def gradient_cosine(run: Fitted) -> np.ndarray:
    """Cosines of gradients at the last checkpoint (Hanawa et al. 2021): blind to how long a gradient is."""
    query = torch.cat([run.query_gradients[layer.name].flatten(1) for layer in run.layers], dim=1)
    return cosines(gradient_dot(run).T, run.norms(run.final), query).T


def tracin(run: Fitted) -> np.ndarray:
    """TracInCP (Pruthi et al. 2020, equation 3): dot products at every checkpoint, weighted by the learning rate that followed.

    A row counts by the share of each segment's learning rate that went through it.
    """
    total: np.ndarray | float = 0.0
    for segment in run.segments:
        received = segment.time * run.exposure[:, segment.index] / (len(segment.checkpoints) * segment.tokens_per_document)
        for checkpoint in segment.checkpoints:
            total = total + received[:, None] * run.dot(checkpoint, run.query_gradients_at(checkpoint))
    return np.asarray(total).T


def ekfac_influence(run: Fitted) -> np.ndarray:
    """EK-FAC influence functions at the last checkpoint (Grosse et al. 2023, arXiv 2308.03296)."""
    last = run.segments[-1]
    factors = run.segment_factors(last, [run.final])
    conditioned = precondition(run.query_gradients, factors.plain, damping=run.settings.damping)
    return run.dot(run.final, conditioned).T / (len(run.train) * last.tokens_per_document)


def source(run: Fitted) -> np.ndarray:
    """SOURCE (Bae et al. 2024, arXiv 2405.12186), with the optimizer as a preconditioner (`preconditioner.py`)."""
    return source_values(run.query_gradients, run.dynamics, run.segments, exposure=run.exposure, dot=run.dot)


def fast_source(run: Fitted) -> np.ndarray:
    """FAST-SOURCE (Bae et al. 2024): factors and gradients of each segment are those of the average of its checkpoints."""
    average = averaged(run.run, [segment.checkpoints for segment in run.segments])
    fast = Fitted(average, run.task, run.train, run.queries, run.settings)
    return source_values(run.query_gradients, fast.dynamics, fast.segments, exposure=fast.exposure, dot=fast.dot)


def source_cg(run: Fitted) -> np.ndarray:
    """SOURCE with each segment's response solved by conjugate gradients for all layers together (ASTRA-SOURCE, arXiv 2507.14740).

    Raises:
        ValueError: AdamW's preconditioner enters by the diagonal form, which has no symmetric matrix to solve with.
    """
    if any(isinstance(held, DiagonalCurvature) for segment in run.dynamics for held in segment.curvature.values()):
        raise ValueError(
            "source_cg: adam is diagonal, a form with no symmetric matrix to solve with; set adam to scalar or symmetric"
        )

    def solved(ekfac: SegmentDynamics) -> SolvedDynamics:
        segment = run.segments[ekfac.index]
        damping = dict.fromkeys(ekfac.curvature, ekfac.weight_decay + 1 / ekfac.time)
        curvature = DampedCurvature.of(run.layers, ekfac.curvature, damping, device=run.device)
        product = run.product(segment, segment.checkpoints)
        return SolvedDynamics(
            ekfac, lambda query: respond(query, curvature, _by_cg(run, product), queries_at_once=run.queries_at_once)
        )

    dynamics = [solved(ekfac) for ekfac in run.dynamics]
    return source_values(run.query_gradients, dynamics, run.segments, exposure=run.exposure, dot=run.dot)


def cg(run: Fitted) -> np.ndarray:
    """Influence functions by conjugate gradients on the Gauss-Newton matrix (Martens 2010), preconditioned with EK-FAC.

    The damping of the solvers is `1/(eta_bar K)`, what training's end implies (see `_solved_influence`).
    """
    return _solved_influence(run, _by_cg(run, run.product(run.segments[-1], [run.final])))


def lissa(run: Fitted) -> np.ndarray:
    """Influence functions by LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017, arXiv 1703.04730)."""
    products, product = run.stochastic_products(run.segments[-1], run.final), run.product(run.segments[-1], [run.final])

    def solver(curvature: DampedCurvature, b: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(run.settings.seed)
        scale = LISSA_MARGIN * largest_eigenvalue(curvature.times(product), b, iterations=POWER_ITERATIONS, generator=generator)
        return descend(
            lambda k: curvature.times(products(k)),
            b,
            precondition=lambda v: v / scale,
            iterations=run.settings.iterations or STOCHASTIC_ITERATIONS,
        )

    return _solved_influence(run, solver)


def astra(run: Fitted) -> np.ndarray:
    """ASTRA (arXiv 2507.14740): stochastic iterations preconditioned with EK-FAC, from EK-FAC's answer."""
    products = run.stochastic_products(run.segments[-1], run.final)

    def solver(curvature: DampedCurvature, b: Tensor) -> Tensor:
        return descend(
            lambda k: curvature.times(products(k)),
            b,
            precondition=curvature.approximate_inverse,
            iterations=run.settings.iterations or STOCHASTIC_ITERATIONS,
            step_size=0.01,  # this and what follows: their settings
            momentum=0.9,
            halve_every=50,
        )

    return _solved_influence(run, solver)


CG_ITERATIONS = 20
STOCHASTIC_ITERATIONS = 200
POWER_ITERATIONS = 20
LISSA_MARGIN = 2.0  # the largest eigenvalue of a few rows is larger than that of many, and power iteration finds it from below


def _by_cg(run: Fitted, product: Product) -> Solver:
    iterations = run.settings.iterations or CG_ITERATIONS
    return lambda curvature, b: conjugate_gradients(
        curvature.times(product), b, precondition=curvature.approximate_inverse, iterations=iterations
    )


def _solved_influence(run: Fitted, solver: Solver) -> np.ndarray:
    """Influence functions at the last checkpoint, EK-FAC's answer improved by a solver.

    Damped by one number for all layers; if none is set, by the mean of SOURCE's 1/(eta_bar K), weighted by steps, as ASTRA is.
    """
    last = run.segments[-1]
    factors = run.segment_factors(last, [run.final]).plain
    implied = np.average([1 / segment.time for segment in run.segments], weights=[segment.num_steps for segment in run.segments])
    damping = dict.fromkeys(factors, run.settings.solver_damping or float(implied))
    seen = {name: plain(held) for name, held in factors.items()}
    curvature = DampedCurvature.of(run.layers, seen, damping, device=run.device)
    response = respond(run.query_gradients, curvature, solver, queries_at_once=run.queries_at_once)
    return run.dot(run.final, response).T / (len(run.train) * last.tokens_per_document)


def trak(run: Fitted) -> np.ndarray:
    """TRAK at the last checkpoint (Park et al. 2023, arXiv 2303.14186), on the tracked layers' gradients."""
    model, query = run.model(-1), pack(run.query_gradients, run.layers)
    sketch = Sketch.draw(query.shape[1], size=run.settings.projection_size, seed=run.settings.seed, like=query)
    Phi, Q = query.new_zeros(len(run.train), sketch.size), query.new_zeros(len(run.train))
    for batch in run.batches():
        Phi[batch.rows], Q[batch.rows] = features(model, run.layers, batch, task=run.task, sketch=sketch)
    return trak_scores(sketch.apply(query), Phi, Q).cpu().numpy()


def averaged_influence(run: Fitted) -> np.ndarray:
    """Influence where the counterfactual training ends, at averaged weights, solved for all layers (`averaged_influence.py`)."""
    return averaged_influence_scores(run)


def replay(run: Fitted) -> np.ndarray:
    """Exact unrolled differentiation of the recorded run (MAGIC, arXiv 2504.16430; `replay.py`): the oracle for this one run."""
    return replay_scores(run.run, run.task, run.train, run.queries) / run.queries.num_loss_tokens[:, None]


def surrogate(run: Fitted) -> np.ndarray:
    """Kernel machines in the run's own tangent space, retrained on random halves (`surrogate.py`)."""
    return surrogate_scores(run)


def datamodel(run: Fitted) -> np.ndarray:
    """Another method's scores corrected by real retrainings on random halves (Ilyas et al. 2022; `datamodel.py`)."""
    prior = named(prior_of(run.task, run.train, asked_for=run.settings.prior), where="attribute: prior")
    signs, differences = retrain_on_halves(run)
    return posterior(prior(run), signs, differences)


def prior_of(task: Task, train: Data, *, asked_for: str = "") -> str:
    """The method whose scores `datamodel` corrects: the one that is asked for, else the most accurate that takes the task.

    Raises:
        ValueError: it is asked to correct itself.
    """
    if "datamodel" in asked_for.split(ENSEMBLE):
        raise ValueError(f"attribute: prior: {asked_for!r}; expected another method, whose scores datamodel corrects")
    kernels = isinstance(task, (Classification, Regression)) and isinstance(train, Examples)
    return asked_for or ("surrogate+averaged_influence" if kernels else "averaged_influence")


def random(run: Fitted) -> np.ndarray:
    """A uniform draw per row and query."""
    return np.stack([random_scores(run.train.ids, seed=run.settings.seed + query) for query in range(len(run.queries))])


def bm25(run: Fitted) -> np.ndarray:
    """BM25 of documents for each query, a token being a word.

    Raises:
        ValueError: the data are not documents.
    """
    if not isinstance(run.train, Documents) or not isinstance(run.queries, Documents):
        raise ValueError("bm25: the data have no tokens; expected Documents; leave the method out")
    return token_bm25_scores(run.train.tokens, run.queries.tokens)


METHODS: dict[str, Method] = {
    "gradient_dot": gradient_dot,
    "gradient_cosine": gradient_cosine,
    "tracin": tracin,
    "ekfac_influence": ekfac_influence,
    "source": source,
    "fast_source": fast_source,
    "source_cg": source_cg,
    "cg": cg,
    "lissa": lissa,
    "astra": astra,
    "trak": trak,
    "averaged_influence": averaged_influence,
    "surrogate": surrogate,
    "datamodel": datamodel,
    "replay": replay,
    "bm25": bm25,
    "random": random,
}


def named(name: str, *, where: str) -> Method:
    """The method of that name; of several joined by +, their ensemble.

    Raises:
        ValueError: there is no such method; it begins with `where`, who asks.
    """
    members = name.split(ENSEMBLE)
    for member in members:
        if member not in METHODS:
            raise ValueError(f"{where}: unknown method {member!r}; known are {', '.join(METHODS)}, and any of them joined by +")
    return lambda run: ensemble([METHODS[member](run) for member in members])
