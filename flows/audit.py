"""The flow `audit`: score documents with the existing checkpoints, without retraining. It fails if a limit is exceeded."""

from flows.shell import exit_code, supervise

if __name__ == "__main__":
    supervise("flows.audit")

import json
import os
import subprocess
import sys
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.graph import GRACE_SECONDS, QUIET_LOGS
from tda.cli import LIMIT_PASSED, OK

COMMAND = [sys.executable, "-m", "tda", "audit", "--json"]


@flow(name="audit")
def audit(root: str = ".") -> dict:
    """Run `tda audit`, publish and return what it found.

    Raises:
        RuntimeError: the audit could not be made, or a limit of params.yaml was exceeded.
    """
    logger = get_run_logger()
    process = subprocess.Popen(
        COMMAND,
        cwd=root,
        env=os.environ | QUIET_LOGS,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, messages = process.communicate()
    finally:
        _end(process)
    for line in filter(None, map(str.rstrip, messages.splitlines())):
        logger.info(line)
    if process.returncode not in {OK, LIMIT_PASSED}:
        raise RuntimeError(
            f"the audit was not made: {messages.strip().splitlines()[-1] if messages.strip() else process.returncode}"
        )
    found = json.loads(output)
    page = Path(root, found["report"]).resolve()
    create_markdown_artifact(
        f"# {'Passed' if found['passed'] else 'Limit passed'}\n\n{found['summary']}\n\n**Report.** `{page}`\n",
        key="audit",
        description="The latest audit of the training documents",
    )
    create_link_artifact(
        page.as_uri(), key="audit-report", link_text="The audit's report", description="On the machine that ran the flow"
    )
    if not found["passed"]:
        raise RuntimeError(f"a limit was passed: {found['summary']}")
    return found


def _end(process: subprocess.Popen) -> None:
    """Stop the audit if it still runs, because the flow was stopped."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    sys.exit(exit_code("flows.audit", audit(return_state=True)))
