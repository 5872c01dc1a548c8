"""`tda evaluate lds`: how well methods predict the measurements of a bank, from single runs and from their ensemble."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from tda.bank import Bank, ceiling
from tda.bank_scores import RunStore, Scored
from tda.data import Documents
from tda.lds import MethodLDS, interval_words, mean_over_queries, method_lds
from tda.variants import Variant

BASELINES = ("random", "bm25", "gradient_dot")
BEST = ("averaged_influence", "surrogate", "surrogate+averaged_influence", "datamodel")
REFERENCES = ("ekfac_influence", "source")  # what other methods are compared with


def default_methods(bank: Bank, among: Sequence[str] = (*BASELINES, *REFERENCES, *BEST)) -> list[str]:
    """The methods to evaluate by default: baselines, references and the best ones, as far as they apply to the data.

    For language models, `datamodel` is left out, as it trains a hundred times.
    """
    documents = isinstance(bank.data.queries(bank.recipe), Documents)
    left_out = ("surrogate", "datamodel") if documents else ("bm25",)
    return [name for name in among if not any(part in name for part in left_out)]


def evaluate_lds(bank: Bank, variants: Sequence[Variant], seeds: Sequence[int], *, store: RunStore, name: str) -> dict:
    """Everything that was found, ready for JSON; `name` is what to call the bank."""
    scored = store.scores(variants, seeds)
    found = {label: method_lds([one.values for one in runs], bank.masks, bank.costs) for label, runs in scored.items()}
    references = [variant.label for variant in variants if variant.method in REFERENCES] or [variants[0].label]
    return {
        "bank": describe(bank, name),
        "ceiling": ceiling(bank),
        "seeds": list(seeds),
        "checkpoints": store.num_checkpoints,
        "interval": interval_words(bank.data.num_queries),
        "training_cpu_seconds": float(np.mean([store.training_seconds(seed) for seed in seeds])),
        "methods": {label: _method(found[label], scored[label]) for label in found},
        "differences": {
            reference: {label: _difference(found[label], found[reference]) for label in found if label != reference}
            for reference in references
        },
    }


def describe(bank: Bank, name: str) -> dict:
    """Sizes and kinds of a bank."""
    subsets, repeats, queries = bank.measurements.shape
    return {
        "name": name,
        "rows": bank.data.num_rows,
        "queries": queries,
        "subsets": subsets,
        "repeats": repeats,
        "loss": bank.recipe.loss,
        "measurement": bank.recipe.measurement,
    }


def _method(found: MethodLDS, scored: Sequence[Scored]) -> dict:
    single = asdict(mean_over_queries(found.of_single)) | {
        "sd_over_seeds": found.spread,
        "by_seed": found.by_run.mean(axis=1).tolist(),
        "by_query": found.of_single.tolist(),
    }
    ensemble = None
    if len(scored) > 1:
        ensemble = asdict(mean_over_queries(found.of_ensemble)) | {"by_query": found.of_ensemble.tolist()}
    return {
        "single": single,
        "ensemble": ensemble,
        "cpu_seconds": float(np.mean([one.usage.cpu_seconds for one in scored])),
        "peak_mib": max(one.usage.peak_mib for one in scored),
        "peak_rise_mib": max(one.usage.peak_rise_mib for one in scored),
    }


def _difference(ours: MethodLDS, reference: MethodLDS) -> dict:
    """Ours minus the reference, query by query."""
    both = {"single": asdict(mean_over_queries(ours.of_single - reference.of_single)), "ensemble": None}
    if len(ours.by_run) > 1:
        both["ensemble"] = asdict(mean_over_queries(ours.of_ensemble - reference.of_ensemble))
    return both


def render_lds(result: dict) -> str:
    """The result as tables for a terminal."""
    from tda.text_table import text_table

    bank, seeds = result["bank"], len(result["seeds"])
    top = "unknown (one repeat)" if result["ceiling"] is None else f"{result['ceiling']:.3f}"
    lines = [
        f"{bank['name']}: {bank['rows']} rows, {bank['queries']} queries, {bank['subsets']} subsets x {bank['repeats']} repeats; "
        f"{bank['loss']}, {bank['measurement']}",
        f"noise ceiling {top}; {seeds} run{'s' * (seeds > 1)} of {result['training_cpu_seconds']:.0f} s each; "
        f"intervals: {result['interval']}",
        "",
    ]
    ranked = sorted(result["methods"], key=lambda label: -result["methods"][label]["single"]["mean"])
    of_runs = [f"mean of {seeds} runs", "sd of runs"] if seeds > 1 else []
    rows = [[label, *_cells(result["methods"][label], seeds)] for label in ranked]
    lines.append(text_table(["LDS", "single run", *of_runs, "CPU s a run", "peak MiB (rise)"], rows))
    for reference, differences in result["differences"].items():
        kinds = ["single", "ensemble"][: 1 + (seeds > 1)]
        rows = [
            [label, *(with_interval(differences[label][kind], sign=True) for kind in kinds)]
            for label in ranked
            if label in differences
        ]
        if rows:
            lines += ["", text_table([f"minus {reference}", "single run", *of_runs[:1]], rows)]
    return "\n".join(lines)


def _cells(method: dict, seeds: int) -> list[str]:
    of_runs = [with_interval(method["ensemble"]), f"{method['single']['sd_over_seeds']:.3f}"] if seeds > 1 else []
    memory = f"{method['peak_mib']:.0f} (+{method['peak_rise_mib']:.0f})"
    return [with_interval(method["single"]), *of_runs, f"{method['cpu_seconds']:.1f}", memory]


def with_interval(value: dict, *, sign: bool = False) -> str:
    """A mean and its interval, for a terminal."""
    kind = "+.3f" if sign else ".3f"
    return f"{value['mean']:{kind}} [{value['low']:{kind}}, {value['high']:{kind}}]"
