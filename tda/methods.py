"""The attribution methods. Each takes a fitted run and returns (query, row) scores; positive means that the row helps the query.

SOURCE, influence functions, surrogate, datamodel and replay predict how much the query's mean cost per term would rise if the row
were left out of training. The scores of the other methods have no unit. `a+b` names the ensemble of two or more methods.
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
from tda.scores import ENSEMBLE, cosines, ensemble, received_per_checkpoint, source_values
from tda.solve import DampedCurvature, SolvedDynamics, Solver, respond
from tda.source import Dynamics, SegmentDynamics
from tda.surrogate import surrogate_scores
from tda.task import Classification, Regression, Task
from tda.trajectory import averaged
from tda.trak import CountSketch, features, trak_scores

Method = Callable[[Fitted], np.ndarray]


def gradient_dot(fitted: Fitted) -> np.ndarray:
    """Dot products of gradients at the last checkpoint (Charpiat et al. 2019)."""
    return fitted.dot(fitted.final, fitted.query_gradients).T


def gradient_cosine(fitted: Fitted) -> np.ndarray:
    """Cosines of gradients at the last checkpoint (Hanawa et al. 2021); a gradient's length does not count."""
    query = pack(fitted.query_gradients, fitted.layers)
    return cosines(gradient_dot(fitted).T, fitted.norms(fitted.final), query).T


def tracin(fitted: Fitted) -> np.ndarray:
    """TracInCP (Pruthi et al. 2020, equation 3): dot products at every checkpoint, weighted by the learning rate that followed.

    A row is weighted by the share of each segment's learning rate that it received.
    """
    total: np.ndarray | float = 0.0
    for segment in fitted.segments:
        received = segment.time * received_per_checkpoint(segment, fitted.exposure)
        for checkpoint in segment.checkpoints:
            total = total + received[:, None] * fitted.dot(checkpoint, fitted.query_gradients_at(checkpoint))
    return np.asarray(total).T


def ekfac_influence(fitted: Fitted) -> np.ndarray:
    """EK-FAC influence functions at the last checkpoint (Grosse et al. 2023, arXiv 2308.03296)."""
    last = fitted.segments[-1]
    factors = fitted.segment_factors(last, [fitted.final])
    conditioned = precondition(fitted.query_gradients, factors.plain, damping=fitted.settings.damping)
    return fitted.dot(fitted.final, conditioned).T * fitted.shares / last.tokens_per_document


def source(fitted: Fitted) -> np.ndarray:
    """SOURCE (Bae et al. 2024, arXiv 2405.12186), with the optimizer as a preconditioner (`preconditioner.py`)."""
    return source_values(fitted.query_gradients, fitted.dynamics, fitted.segments, exposure=fitted.exposure, dot=fitted.dot)


def fast_source(fitted: Fitted) -> np.ndarray:
    """FAST-SOURCE (Bae et al. 2024): factors and gradients once per segment, at the mean of its checkpoints' weights."""
    average = averaged(fitted.run, [segment.checkpoints for segment in fitted.segments])
    fast = Fitted(average, fitted.task, fitted.train, fitted.queries, fitted.settings)
    return source_values(fitted.query_gradients, fast.dynamics, fast.segments, exposure=fast.exposure, dot=fast.dot)


def source_cg(fitted: Fitted) -> np.ndarray:
    """SOURCE with each segment's response solved by conjugate gradients for all layers together (ASTRA-SOURCE, arXiv 2507.14740).

    Raises:
        ValueError: the setting `adam` is diagonal, a form without a symmetric matrix to solve with.
    """
    if any(isinstance(held, DiagonalCurvature) for segment in fitted.dynamics for held in segment.curvature.values()):
        raise ValueError(
            "source_cg: adam is diagonal, a form with no symmetric matrix to solve with; set adam to scalar or symmetric"
        )

    def solved(ekfac: SegmentDynamics) -> Dynamics:
        if not ekfac.time:  # nothing was learned, and EK-FAC's response is 0 too
            return ekfac
        segment = fitted.segments[ekfac.index]
        damping = dict.fromkeys(ekfac.curvature, ekfac.weight_decay + 1 / ekfac.time)
        curvature = DampedCurvature.of(fitted.layers, ekfac.curvature, damping, device=fitted.device)
        product = fitted.product(segment, segment.checkpoints)
        return SolvedDynamics(
            ekfac, lambda query: respond(query, curvature, _by_cg(fitted, product), queries_at_once=fitted.queries_at_once)
        )

    dynamics = [solved(ekfac) for ekfac in fitted.dynamics]
    return source_values(fitted.query_gradients, dynamics, fitted.segments, exposure=fitted.exposure, dot=fitted.dot)


def cg(fitted: Fitted) -> np.ndarray:
    """Influence functions by conjugate gradients on the Gauss-Newton matrix (Martens 2010), preconditioned with EK-FAC.

    `_solved_influence` says how it is damped.
    """
    return _solved_influence(fitted, _by_cg(fitted, fitted.product(fitted.segments[-1], [fitted.final])))


def lissa(fitted: Fitted) -> np.ndarray:
    """Influence functions by LiSSA (Agarwal et al. 2017, arXiv 1602.03943; Koh and Liang 2017, arXiv 1703.04730)."""
    last = fitted.segments[-1]
    products, product = fitted.stochastic_products(last, fitted.final), fitted.product(last, [fitted.final])

    def solver(curvature: DampedCurvature, b: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(fitted.settings.seed)
        scale = LISSA_MARGIN * largest_eigenvalue(curvature.times(product), b, iterations=POWER_ITERATIONS, generator=generator)
        return descend(
            lambda k: curvature.times(products(k)),
            b,
            precondition=lambda v: v / scale,
            iterations=fitted.settings.iterations or STOCHASTIC_ITERATIONS,
        )

    return _solved_influence(fitted, solver)


def astra(fitted: Fitted) -> np.ndarray:
    """Influence functions by ASTRA (arXiv 2507.14740): stochastic iterations preconditioned with EK-FAC, from EK-FAC's answer."""
    products = fitted.stochastic_products(fitted.segments[-1], fitted.final)

    def solver(curvature: DampedCurvature, b: Tensor) -> Tensor:
        return descend(
            lambda k: curvature.times(products(k)),
            b,
            precondition=curvature.approximate_inverse,
            iterations=fitted.settings.iterations or STOCHASTIC_ITERATIONS,
            step_size=0.01,  # this and the next two: the paper's settings
            momentum=0.9,
            halve_every=50,
        )

    return _solved_influence(fitted, solver)


CG_ITERATIONS = 20
STOCHASTIC_ITERATIONS = 200
POWER_ITERATIONS = 20
LISSA_MARGIN = 2.0  # a few rows have a larger eigenvalue than all rows, and power iteration approaches it from below


def _by_cg(fitted: Fitted, product: Product) -> Solver:
    iterations = fitted.settings.iterations or CG_ITERATIONS
    return lambda curvature, b: conjugate_gradients(
        curvature.times(product), b, precondition=curvature.approximate_inverse, iterations=iterations
    )


def _solved_influence(fitted: Fitted, solver: Solver) -> np.ndarray:
    """Influence functions at the last checkpoint by `solver`, which starts from EK-FAC's answer.

    All layers have one damping if it is set. By default it is what SOURCE implies, 1/(eta_bar K), averaged over segments by their
    steps (as in ASTRA), and with AdamW divided by the median of a layer's preconditioner.
    """
    last = fitted.segments[-1]
    factors = fitted.segment_factors(last, [fitted.final])
    learned = [segment for segment in fitted.segments if segment.time]
    implied = np.average([1 / segment.time for segment in learned], weights=[segment.num_steps for segment in learned])
    damping = {
        name: fitted.settings.solver_damping or float(implied / (factors.P[name].median() if factors.P else 1))
        for name in factors.plain
    }
    seen = {name: plain(held) for name, held in factors.plain.items()}
    curvature = DampedCurvature.of(fitted.layers, seen, damping, device=fitted.device)
    response = respond(fitted.query_gradients, curvature, solver, queries_at_once=fitted.queries_at_once)
    return fitted.dot(fitted.final, response).T * fitted.shares / last.tokens_per_document


def trak(fitted: Fitted) -> np.ndarray:
    """TRAK at the last checkpoint (Park et al. 2023, arXiv 2303.14186), on the tracked layers' gradients."""
    model, query = fitted.model(-1), pack(fitted.query_gradients, fitted.layers)
    sketch = CountSketch.draw(query.shape[1], size=fitted.settings.projection_size, seed=fitted.settings.seed, like=query)
    Phi, Q = query.new_zeros(len(fitted.train), sketch.size), query.new_zeros(len(fitted.train))
    for batch in fitted.batches():
        Phi[batch.rows], Q[batch.rows] = features(model, fitted.layers, batch, task=fitted.task, sketch=sketch)
    return trak_scores(sketch.apply(query), Phi, Q).cpu().numpy()


def averaged_influence(fitted: Fitted) -> np.ndarray:
    """Influence functions at averaged weights where the counterfactual training ends, solved for all layers (see the module)."""
    return averaged_influence_scores(fitted)


def replay(fitted: Fitted) -> np.ndarray:
    """Exact unrolled differentiation of the recorded run (MAGIC, arXiv 2504.16430; `replay.py`): the oracle for this one run."""
    return replay_scores(fitted.run, fitted.task, fitted.train, fitted.queries) / fitted.queries.num_loss_tokens[:, None]


def surrogate(fitted: Fitted) -> np.ndarray:
    """Kernel machines in the run's tangent kernel, refitted on random halves (`surrogate.py`)."""
    return surrogate_scores(fitted)


def datamodel(fitted: Fitted) -> np.ndarray:
    """The scores of another method, corrected by real retrainings on random halves (Ilyas et al. 2022; `datamodel.py`)."""
    prior = named(prior_of(fitted.task, fitted.train, asked_for=fitted.settings.prior), where="attribute: prior")
    signs, differences = retrain_on_halves(fitted)
    return posterior(prior(fitted), signs, differences)


def prior_of(task: Task, train: Data, *, asked_for: str = "") -> str:
    """The method whose scores `datamodel` corrects: `asked_for`, or else the most accurate one for the task.

    Raises:
        ValueError: `asked_for` is datamodel itself.
    """
    if "datamodel" in asked_for.split(ENSEMBLE):
        raise ValueError(f"attribute: prior: {asked_for!r}; expected another method, whose scores datamodel corrects")
    kernels = type(task) in (Classification, Regression) and isinstance(train, Examples)
    return asked_for or ("surrogate+averaged_influence" if kernels else "averaged_influence")


def random(fitted: Fitted) -> np.ndarray:
    """A uniform draw per row and query."""
    return np.stack([random_scores(fitted.train.ids, seed=fitted.settings.seed + query) for query in range(len(fitted.queries))])


def bm25(fitted: Fitted) -> np.ndarray:
    """BM25 of documents for each query, with tokens as words.

    Raises:
        ValueError: the data are not documents.
    """
    if not isinstance(fitted.train, Documents) or not isinstance(fitted.queries, Documents):
        raise ValueError("bm25: the data have no tokens; expected Documents; leave the method out")
    return token_bm25_scores(fitted.train.tokens, fitted.queries.tokens)


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
    """The method `name`, or the ensemble of several joined by +.

    Raises:
        ValueError: there is no such method. The message begins with `where`, the place that names it.
    """
    members = name.split(ENSEMBLE)
    for member in members:
        if member not in METHODS:
            raise ValueError(f"{where}: unknown method {member!r}; known are {', '.join(METHODS)}, and any of them joined by +")
    return lambda fitted: ensemble([METHODS[member](fitted) for member in members])
