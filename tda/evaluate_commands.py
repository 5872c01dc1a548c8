"""What the commands `tda evaluate ...` do: read or make the bank, evaluate, print a table, write JSON and a plot beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tda.artifacts import write_json
from tda.bank import Bank, ceiling, load_bank
from tda.bank_data import ARRAYS, BankData, check_data, read_arrays
from tda.bank_scores import NUM_CHECKPOINTS, RunStore
from tda.builtin_bank import builtin_bank
from tda.evaluate_lds import REFERENCES, default_methods, evaluate_lds, render_lds
from tda.evaluate_mislabelled import evaluate_mislabelled, mislabelled_curves, read_bad_rows, render_mislabelled
from tda.evaluate_removal import Removal, default_counts, evaluate_removal, removal_curves, render_removal
from tda.evaluation_plots import plot_curves, plot_lds
from tda.make_bank import make_bank
from tda.recipe import parse_recipe, resolve
from tda.variants import Variant, parse_variant


@dataclass(frozen=True)
class Request:
    """What all evaluations are asked with."""

    bank: Path | None  # None: the built-in one
    methods: str | None  # separated by commas; None: the usual ones
    num_runs: int
    work: Path  # where runs and scores are kept
    json: Path | None = None
    plot: Path | None = None
    checkpoints: int = NUM_CHECKPOINTS


def lds(request: Request) -> None:
    """`tda evaluate lds`."""
    bank, name = _opened(request)
    variants, store = _variants(request, default_methods(bank)), _store(request, bank)
    result = evaluate_lds(bank, variants, range(request.num_runs), store=store, name=name)
    print(render_lds(result))
    _write(request, f"{name}-lds", result, lambda path: plot_lds(result, path))


def removal(request: Request, *, counts: Sequence[int] | None, num_queries: int, num_retrainings: int, together: bool) -> None:
    """`tda evaluate removal`; `counts` are numbers of rows to remove."""
    bank, name = _opened(request)
    variants, store = _variants(request, REFERENCES), _store(request, bank)
    counts = tuple(sorted(set(counts))) if counts else default_counts(bank.data.num_rows)
    asked = Removal(counts, num_queries, num_retrainings, together)
    result = evaluate_removal(bank, variants, range(request.num_runs), asked, store=store, name=name)
    print(render_removal(result))
    curves, words = removal_curves(result)
    _write(request, f"{name}-removal", result, lambda path: plot_curves(curves, path, **words))


def mislabelled(request: Request, *, bad: Path | None, by: str) -> None:
    """`tda evaluate mislabelled`; `bad` is a file of row numbers, `by` what ranks the rows."""
    bank, name = _opened(request)
    variants, store = _variants(request, REFERENCES), _store(request, bank)
    wrong = read_bad_rows(bad, bank.data)
    result = evaluate_mislabelled(bank, wrong, variants, range(request.num_runs), by=by, store=store, name=name)
    print(render_mislabelled(result))
    curves, words = mislabelled_curves(result)
    _write(request, f"{name}-mislabelled-by-{by}", result, lambda path: plot_curves(curves, path, **words))


def make(data: Path, out: Path, *, num_subsets: int, repeats: int, seed: int) -> None:
    """`tda evaluate bank`: the bank of the rows, queries and recipe in `data`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing or wrong, or `out` is another bank.
    """
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such file; expected an .npz with x_train, y_train, x_query, y_query and recipe")
    remedy = "expected an .npz file of the arrays x_train, y_train, x_query, y_query and recipe, as numpy.savez writes it"
    arrays = read_arrays(data, wrong=str(data), remedy=remedy)
    missing = [name for name in ("x_train", "x_query", "recipe") if name not in arrays]
    if missing:
        raise ValueError(f"{data}: {', '.join(missing)} missing; expected x_train, y_train, x_query, y_query and recipe")
    recipe = resolve(parse_recipe(str(arrays.pop("recipe")), origin=str(data)), data.parent, origin=str(data))
    held = {name: arrays.pop(name, None) for name in ARRAYS}
    extras = {name: value for name, value in arrays.items() if name not in ("masks", "measurements", "full_runs")}
    rows = BankData(**held, extras=extras)
    check_data(rows, recipe, origin=str(data))
    bank = make_bank(rows, recipe, num_subsets=num_subsets, repeats=repeats, seed=seed, out=out)
    top = ceiling(bank)
    known = "unknown" if top is None else f"{top:.3f}"
    print(f"bank     {out}   ({num_subsets} subsets x {repeats} repeats; noise ceiling {known})")
    print(f"next     tda evaluate lds --bank {out}")


def _opened(request: Request) -> tuple[Bank, str]:
    """The bank and its name. Places that cannot be written to are found out now, not after the work."""
    for path in (request.work / "x", request.json, request.plot):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if request.bank is not None:
        return load_bank(request.bank), request.bank.stem
    path = request.work / "builtin.npz"
    print(f"bank     {path}   (built in; made {'before' if path.exists() else 'now: a few minutes, once'})\n", flush=True)
    return builtin_bank(path), path.stem


def _variants(request: Request, usual: Sequence[str]) -> list[Variant]:
    labels = request.methods.split(",") if request.methods else usual
    return [parse_variant(label.strip()) for label in dict.fromkeys(labels)]


def _store(request: Request, bank: Bank) -> RunStore:
    return RunStore(bank.data, bank.recipe, request.work, request.checkpoints)


def _write(request: Request, name: str, result: dict, plot: Callable[[Path], None]) -> None:
    json_path = request.json or request.work / f"{name}.json"
    plot_path = request.plot or json_path.with_suffix(".png")
    write_json(json_path, result)
    plot(plot_path)
    print(f"\njson     {json_path}\nplot     {plot_path}")
