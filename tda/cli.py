"""The command `tda`: one command per stage, and questions to the store. Nothing heavy is imported before a command runs."""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path

from tda.bank_help import DESCRIPTION as BANK_DATA
from tda.pipeline import STAGES, Stage

OK, FAILED, USAGE, LIMIT_PASSED, MISMATCH, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143

EXIT_CODES = f"""exit codes:
  {OK}    done
  {FAILED}    wrong input, missing file or failed stage; the message says what to do
  {USAGE}    wrong usage
  {LIMIT_PASSED}    audit: a limit of params.yaml was passed
  {MISMATCH}    verify: an artifact or the store differs from its manifest
  {INTERRUPTED}  interrupted"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code, by `EXIT_CODES`."""
    options = _parser().parse_args(arguments)
    try:
        with _stopped_by_signal():
            return options.run(options)
    except KeyboardInterrupt:
        print(f"tda {options.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except ModuleNotFoundError as error:
        if options.traceback or (error.name or "").startswith("tda"):
            raise
        print(
            f"tda {options.command}: {sys.executable} lacks the package {error.name}, which the project needs; "
            "run `make install`, then `.venv/bin/tda`, or put .venv/bin first on the PATH",
            file=sys.stderr,
        )
        return FAILED
    except (ValueError, RuntimeError, OSError) as error:
        if options.traceback:
            traceback.print_exc()
        print(f"tda {options.command}: {_message(error)}", file=sys.stderr)
        return FAILED


def _message(error: Exception) -> str:
    """What an error says, in words; an error of the system has its reason before the file it concerns."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that half-written files are removed and workers ended."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps an example's lines, and each command on one line of its own."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=24, width=110)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tda",
        description="Which training documents helped a language model, which hurt it, and the proof.",
        epilog=f"example:\n  tda query 'def add(a, b):'\n\n{EXIT_CODES}",
        formatter_class=_HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND [OPTION]", title="stages and commands")
    for stage in STAGES.values():
        _add_stage(commands, stage)

    query = _add(commands, _query, "the documents that most helped and most hurt on a text", "query 'def add(a, b):' --top 5")
    text = query.add_mutually_exclusive_group(required=True)
    text.add_argument("text", metavar="TEXT", nargs="?", help="the text; - reads standard input")
    text.add_argument("--file", type=Path, help="read the text from FILE instead")
    query.add_argument("--top", type=_positive, default=10, metavar="N", help="documents on either side (default: %(default)s)")
    _add_json(query)

    plan = _add(commands, _plan, "what a run will take: time, disk and memory of every stage", "plan --json plan.json")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE too")
    plan.add_argument(
        "--flops", type=_amount, metavar="N", help="of another machine: operations a second of each worker, as 4e14"
    )
    plan.add_argument("--disk", type=_amount, metavar="N", help="of another machine: bytes written a second, as 2e9")
    plan.add_argument("--memory", type=_amount, metavar="N", help="of another machine: bytes of memory free, as 8e10")

    verdict = _add(commands, _verdict, "the verdict, where the report is, and what to do next", "verdict")
    _add_json(verdict)

    audit = _add(commands, _audit, "score the documents with the checkpoints at hand, check limits", "audit --date 2026-01-31")
    audit.add_argument("--date", type=_date, help="date of the audit, YYYY-MM-DD (default: today)")
    _add_json(audit)

    _add(commands, _verify, "check the rows of the gradient store against their manifests", "verify")

    _add_evaluate(commands)

    gc = _add(commands, _gc, "remove what nothing refers to any more", "gc --dry-run")
    gc.add_argument("--dry-run", action="store_true", help="only list it")
    return parser


def _subparser(
    commands: argparse._SubParsersAction, purpose: str, example: str, *, under: str = "", more: str = ""
) -> argparse.ArgumentParser:
    """A command named by the first word of its `example`; `under` is the command that it belongs to, `more` is added help."""
    return commands.add_parser(
        example.split()[0],
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=f"example:\n  tda {under}{example}\n\n{more}{EXIT_CODES}",
        formatter_class=_HelpFormatter,
    )


def _add(commands: argparse._SubParsersAction, run: Callable, purpose: str, example: str) -> argparse.ArgumentParser:
    """A command on the workspace, as all are but those of `tda evaluate`."""
    command = _subparser(commands, purpose, example)
    command.set_defaults(run=run)
    command.add_argument("--params", type=Path, default="params.yaml", metavar="FILE", help="settings (default: %(default)s)")
    command.add_argument("--root", type=Path, default=Path(), metavar="FOLDER", help="folder that holds data/ (default: here)")
    command.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
    return command


def _add_stage(commands: argparse._SubParsersAction, stage: Stage) -> None:
    command = _add(commands, _stage, stage.makes, f"{stage.name} --index 0" if stage.indices else stage.name)
    if stage.indices:
        command.add_argument("--index", type=int, required=True, metavar="N", help=f"one of {stage.indices} in params.yaml")
    else:
        command.set_defaults(index=None)
    command.add_argument("--profile", action="store_true", help="record where the time goes, in one process: data/profile/")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    purpose = "how well attribution methods predict what removing data does"
    evaluate = _subparser(commands, purpose, "evaluate lds --bank bank.npz")
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="KIND [OPTION]", title="kinds")

    lds = _add_evaluation(
        kinds,
        _evaluate_lds,
        "scores against retraining on random subsets",
        "lds --bank bank.npz --methods ekfac_influence,source",
    )
    _add_runs(lds, "--seeds")

    removal = _add_evaluation(
        kinds, _evaluate_removal, "remove a query's top rows, retrain, compare with random", "removal --remove 10,50 --queries 20"
    )
    _add_runs(removal, "--runs")
    removal.add_argument("--seeds", type=_positive, default=3, metavar="N", help="retrainings of each (default: %(default)s)")
    removal.add_argument("--queries", type=_positive, default=10, metavar="N", help="how many queries (default: %(default)s)")
    removal.add_argument(
        "--remove", type=_counts, metavar="N,N", help="numbers of rows to remove (default: 0.5%% to 8%% of them)"
    )
    removal.add_argument("--together", action="store_true", help="remove for all queries at once, by their summed scores")

    mislabelled = _add_evaluation(
        kinds, _evaluate_mislabelled, "rank suspected bad rows against known ones", "mislabelled --bank bank.npz --by self"
    )
    _add_runs(mislabelled, "--seeds")
    mislabelled.add_argument("--bad", type=Path, metavar="FILE", help="numbers of the bad rows, from 0 (default: the bank's own)")
    mislabelled.add_argument(
        "--by",
        choices=["queries", "self"],
        default="queries",
        help="rank by harm to the queries, or by self-influence, which takes longer (default: %(default)s)",
    )

    bank = _add_kind(
        kinds,
        _evaluate_bank,
        "make a bank: retrain on random halves of the rows",
        "bank rows.npz bank.npz --subsets 100",
        more=f"{BANK_DATA}\n",
    )
    bank.add_argument("data", type=Path, metavar="DATA", help="rows, queries and recipe, .npz, as told below")
    bank.add_argument("out", type=Path, metavar="OUT", help="the bank to write, .npz; a killed run goes on")
    bank.add_argument("--subsets", type=_positive, default=100, metavar="N", help="random halves (default: %(default)s)")
    bank.add_argument("--repeats", type=_positive, default=10, metavar="N", help="models on each (default: %(default)s)")
    bank.add_argument("--seed", type=_seed, default=0, metavar="N", help="of subsets and models (default: %(default)s)")


def _add_evaluation(kinds: argparse._SubParsersAction, run: Callable, purpose: str, example: str) -> argparse.ArgumentParser:
    command = _add_kind(kinds, run, purpose, example)
    command.add_argument("--bank", type=Path, metavar="FILE", help="bank of measurements (default: make a small one, once)")
    command.add_argument(
        "--methods", metavar="A,B", help="methods, with settings as in source:num_segments=2 (default: the usual)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="where to write the result (default: in the work folder)")
    command.add_argument("--plot", type=_plot_file, metavar="FILE", help="its plot, .png or .svg (default: beside the JSON)")
    command.add_argument(
        "--work", type=Path, default=Path("data/evaluate"), metavar="FOLDER", help="keeps runs and scores (default: %(default)s)"
    )
    return command


def _add_kind(
    kinds: argparse._SubParsersAction, run: Callable, purpose: str, example: str, *, more: str = ""
) -> argparse.ArgumentParser:
    command = _subparser(kinds, purpose, example, under="evaluate ", more=more)
    command.set_defaults(run=run)
    command.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
    return command


def _add_runs(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        name, dest="runs", type=_positive, default=3, metavar="N", help="models to attribute (default: %(default)s)"
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got {text}")
    return int(text)


def _seed(text: str) -> int:
    from tda.config import MAX_SEED

    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {MAX_SEED}; got {text}")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, as 4e14; got {text}")
    return amount


def _counts(text: str) -> list[int]:
    try:
        return [_positive(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1, separated by commas, as 10,50; got {text}") from None


def _plot_file(text: str) -> Path:
    if (path := Path(text)).suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png or .svg; got {text}")
    return path


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a date as 2026-01-31; got {text}") from None


def _inputs(options: argparse.Namespace) -> tuple:
    """The configuration and the workspace that the options name."""
    from tda.artifacts import Workspace
    from tda.config import load_config

    return load_config(options.params), Workspace(options.root)


def _print_json(value: dict) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _stage(options: argparse.Namespace) -> int:
    from tda.pipeline import run_stage

    config, workspace = _inputs(options)
    if not options.profile:
        with _settings_unchanged(options):
            run_stage(options.command, config, workspace, options.index)
        return OK
    from tda.profiling import profiled

    os.environ["TDA_WORKERS"] = "1"  # the profiler sees this process alone
    folder = workspace.profile("-".join([options.command, *([] if options.index is None else [str(options.index)])]))
    with profiled(folder):
        run_stage(options.command, config, workspace, options.index)
    print(f"table    {folder / 'table.txt'}   (in one process, whatever compute.workers says)")
    print(f"trace    {folder / 'trace.json.gz'}   (open it in a browser: chrome://tracing or ui.perfetto.dev)")
    return OK


@contextlib.contextmanager
def _settings_unchanged(options: argparse.Namespace) -> Iterator[None]:
    """Refuse, at the end of the block, settings of the stage that were changed in it: DVC reads them when a stage has ended.

    Raises:
        RuntimeError: some were. As the stage fails, DVC does not record what was made by the old ones as made by the new ones.
    """
    from tda.config import settings_of

    before = settings_of(options.command, options.params)
    yield
    now = settings_of(options.command, options.params)
    if changed := [key for key in before if now[key] != before[key]]:
        stage = options.command if options.index is None else f"{options.command}@{options.index}"
        raise RuntimeError(
            f"{', '.join(changed)} in {options.params} changed while the stage ran, and what it made is by the old settings; run "
            f"`dvc repro` for the new ones, or set the old ones again and run `dvc commit --force {stage}`"
        )


def _query(options: argparse.Namespace) -> int:
    from tda.query import answer, render

    config, workspace = _inputs(options)
    found = answer(_text(options), config=config, workspace=workspace, top=options.top)
    if options.json:
        _print_json(found)
    else:
        print(render(found))
    return OK


def _text(options: argparse.Namespace) -> str:
    """The text that was asked about.

    Raises:
        ValueError: it is empty, or not UTF-8.
    """
    origin = str(options.file or ("standard input" if options.text == "-" else "TEXT"))
    try:
        if options.file is not None:
            text = options.file.read_text(encoding="utf-8-sig")
        else:
            text = sys.stdin.read() if options.text == "-" else options.text
        text.encode("utf-8")  # bytes that are not UTF-8 arrive as surrogates
    except UnicodeError as error:
        raise ValueError(f"{origin}: not UTF-8 text: {error}; convert it") from error
    if not text.strip():
        raise ValueError("the text is empty; expected at least one word")
    return text


def _plan(options: argparse.Namespace) -> int:
    from tda.artifacts import write_json
    from tda.plan import make_plan, render

    config, workspace = _inputs(options)
    plan = make_plan(config, workspace, flops=options.flops, disk=options.disk, memory=options.memory)
    print(render(plan))
    if options.json:
        write_json(options.json, plan.as_json())
    return OK


def _verdict(options: argparse.Namespace) -> int:
    from tda.artifacts import Workspace, read_json

    workspace = Workspace(options.root)
    verdict = read_json(workspace.verdict, stage="evaluation")
    if options.json:
        _print_json(verdict)
        return OK
    outcome = "ACCEPTED: train on the curated data" if verdict["accepted"] else "REJECTED: keep training on all the data"
    print(f"{outcome}\n  {verdict['summary']}\n  rule: {verdict['rule']}\n")
    print(f"report         {workspace.report}   (open it in a browser)")
    print(f"decision       {workspace.manifest}   (keep, weight, score and reason of every document)")
    print(f"curated data   {workspace.curated_jsonl}\n")
    print(f"next           {_command()} query 'any text'   which documents helped or hurt the model on it")
    print("               edit params.yaml, then `make run`: only what the change touches runs again")
    return OK


def _command() -> str:
    """How to call `tda` from here."""
    command = Path(sys.executable).parent / "tda"
    return str(command.relative_to(Path.cwd())) if command.is_relative_to(Path.cwd()) else "tda"


def _audit(options: argparse.Namespace) -> int:
    from tda.artifacts import only_run
    from tda.stages import audit

    config, workspace = _inputs(options)
    with only_run(workspace.work / "audit.lock"):
        result = audit(config, workspace, date=(options.date or datetime.now(UTC).date()).isoformat())
    if options.json:
        _print_json({"passed": result.passed, "summary": result.summary, "report": str(result.report)})
    else:
        print(f"{'PASSED' if result.passed else 'FAILED'}: {result.summary}\nreport   {result.report}")
    return OK if result.passed else LIMIT_PASSED


def _verify(options: argparse.Namespace) -> int:
    from tda.artifacts import Workspace
    from tda.verify import verify

    problems = verify(Workspace(options.root))
    for problem in problems:
        print(f"tda verify: {problem}", file=sys.stderr)
    if not problems:
        print("verified: the store holds the rows that data/gradients names (`dvc status` checks the other files)")
    return MISMATCH if problems else OK


def _request(options: argparse.Namespace) -> object:
    from tda.evaluate_commands import Request

    return Request(options.bank, options.methods, options.runs, options.work, options.json, options.plot)


def _evaluate_lds(options: argparse.Namespace) -> int:
    from tda.evaluate_commands import lds

    lds(_request(options))
    return OK


def _evaluate_removal(options: argparse.Namespace) -> int:
    from tda.evaluate_commands import removal

    removal(
        _request(options),
        counts=options.remove,
        num_queries=options.queries,
        num_retrainings=options.seeds,
        together=options.together,
    )
    return OK


def _evaluate_mislabelled(options: argparse.Namespace) -> int:
    from tda.evaluate_commands import mislabelled

    mislabelled(_request(options), bad=options.bad, by=options.by)
    return OK


def _evaluate_bank(options: argparse.Namespace) -> int:
    from tda.evaluate_commands import make

    make(options.data, options.out, num_subsets=options.subsets, repeats=options.repeats, seed=options.seed)
    return OK


def _gc(options: argparse.Namespace) -> int:
    from tda.artifacts import Workspace
    from tda.verify import collect_garbage

    removed = collect_garbage(Workspace(options.root), dry_run=options.dry_run)
    for item in removed:
        print(item)
    if not removed:
        print("nothing to remove")
    return OK
