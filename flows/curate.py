"""The flow `curate`: the whole pipeline, with a task per stage, in the order of DVC's graph.

`python -m flows.curate` runs it on Prefect's embedded server, `prefect deployment run curate/llm` on a real one.
"""

from flows.shell import exit_code, supervise

if __name__ == "__main__":
    supervise("flows.curate")

import argparse
import contextlib
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows import graph
from flows.settings import override
from flows.slots import Slots, environments
from tda.artifacts import Workspace, read_json
from tda.config import load_config
from tda.provenance import how_to_reproduce

MAX_TASKS = 64  # threads; most of them wait


def _another_try_can_help(task, run, state) -> bool:
    """True if the stage was killed or a lock was taken; false if the input is wrong or someone stopped the flow."""
    error = state.data if isinstance(state.data, Exception) else state.result(raise_on_failure=False)
    return isinstance(error, graph.StageError) and error.by_chance


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=5,
    retry_condition_fn=_another_try_can_help,
)
def run_stage(stage: str, root: str, slots: Slots | None, stopped: threading.Event) -> str:
    """Run one stage in a process of its own. Returns "ran" or "up to date"."""
    log = get_run_logger().info
    if slots is None:
        ran = graph.run_stage(stage, Path(root), environment={}, log=log, stopped=stopped)
    else:
        with slots.one() as environment:
            ran = graph.run_stage(stage, Path(root), environment=environment, log=log, stopped=stopped)
    return "ran" if ran else "up to date"


def _end_stages(flow, flow_run, state) -> None:
    """End the stages of a flow that was cancelled or crashed."""
    graph.reap(Path(flow_run.parameters.get("root", ".")))


@flow(
    name="curate",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_TASKS),
    on_cancellation=[_end_stages],
    on_crashed=[_end_stages],
)
def curate(params: dict[str, Any] | None = None, root: str = ".") -> dict[str, str]:
    """From documents to a curated data set and its verdict. Returns what happened to each stage.

    `params` changes keys of params.yaml permanently, such as {"curation.drop": 0.05}, so that the run can be reproduced from
    it.
    """
    folder = Path(root)
    with graph.only_flow(folder):
        override(folder / "params.yaml", params or {})
        outcomes = {} if graph.is_clean(folder) else _walk(folder)
    if not outcomes:
        get_run_logger().info("Nothing has changed since the last run; nothing to do.")
    publish(Workspace(folder))
    return outcomes


def _walk(root: Path) -> dict[str, str]:
    """Run every stage after those that it needs.

    Raises:
        StageError: at least one failed. The message names each, and those that were not started.
    """
    needs = graph.load_graph(root)
    compute = load_config(root / "params.yaml").compute
    num_parts = Counter(stage.split("@")[0] for stage in needs if "@" in stage)
    slots = {name: Slots(environments(count, compute)) for name, count in num_parts.items()}
    futures, stopped = {}, threading.Event()
    try:
        for stage, needed in needs.items():
            after = [futures[name] for name in needed]
            futures[stage] = run_stage.submit(stage, str(root), slots.get(stage.split("@")[0]), stopped, wait_for=after)
        wait(list(futures.values()))
    except BaseException:  # the flow is being stopped
        stopped.set()
        raise
    states = {stage: future.state for stage, future in futures.items()}
    failed = [stage for stage, state in states.items() if state.is_failed() or state.is_crashed()]
    if failed:
        reasons = "\n".join(str(states[stage].result(raise_on_failure=False)) for stage in failed)
        waiting = [stage for stage, state in states.items() if not state.is_final()]
        not_started = f"\nNot started: {', '.join(waiting)}." if waiting else ""
        raise graph.StageError(f"{reasons}{not_started}\nEverything else is finished and kept; mend the cause and run again.")
    return {stage: state.result() for stage, state in states.items()}


def publish(workspace: Workspace) -> None:
    """Publish the run's verdict, its metrics and a link to the report as Prefect artifacts."""
    verdict = read_json(workspace.verdict, stage="evaluation")
    metrics = read_json(workspace.metrics, stage="evaluation")
    create_markdown_artifact(_verdict_text(verdict, workspace), key="verdict", description="Whether to train on the curated data")
    create_table_artifact(
        [{"metric": name, "value": value} for name, value in flatten(metrics)],
        key="metrics",
        description="Metrics of the evaluation",
    )
    create_link_artifact(
        workspace.report.resolve().as_uri(), key="report", link_text="The report", description="On the machine that ran the flow"
    )


def _verdict_text(verdict: dict, workspace: Workspace) -> str:
    outcome = "Accepted" if verdict["accepted"] else "Rejected"
    return (
        f"# {outcome}\n\n{verdict['summary']}\n\n**Rule.** {verdict['rule']}\n\n"
        f"**To reproduce.** {how_to_reproduce(workspace.root)}\n\n**Report.** `{workspace.report.resolve()}`\n"
    )


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists, each with its dotted name."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in flatten(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [leaf for index, inner in enumerate(value) for leaf in flatten(inner, f"{name}.{index}" if name else str(index))]
    return [(name, value)]


def _settings(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(values := json.loads(text), dict):
            return values
    raise argparse.ArgumentTypeError(f'expected keys and values such as {{"curation.drop": 0.1}}; got {text}')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flows.curate", description=curate.description)
    parser.add_argument("params", metavar="JSON", nargs="?", type=_settings, help="keys of params.yaml to set for good")
    sys.exit(exit_code("flows.curate", curate(params=parser.parse_args().params, return_state=True)))
