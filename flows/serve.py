"""`python -m flows.serve`: both deployments of `prefect.yaml` without a worker, for a machine with no Prefect server.

Ends with Ctrl-C. From another shell, `prefect deployment run curate/llm` starts a run here.
"""

import importlib
from pathlib import Path

from dvc.utils.serialize import load_yaml
from prefect import serve
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment


def deployments(prefect_file: Path) -> list[RunnerDeployment]:
    """The deployments that `prefect_file` declares, in a form that can be served.

    Their own concurrency limits are left out: without a common server they would not be shared. This module serves one run at a
    time instead.
    """
    found = []
    for declared in load_yaml(str(prefect_file))["deployments"]:
        path, _, name = declared["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        schedules = [CronSchedule(cron=entry["cron"], timezone=entry["timezone"]) for entry in declared.get("schedules", [])]
        found.append(flow.to_deployment(declared["name"], parameters=declared.get("parameters"), schedules=schedules))
    return found


if __name__ == "__main__":
    serve(*deployments(Path("prefect.yaml")), limit=1)
