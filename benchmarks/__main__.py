"""`python -m benchmarks NAME [OPTIONS]`: run the benchmark of that name; without a name, list them."""

import importlib
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__main__", "common", "compression"))


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in NAMES:
        print(f"usage: python -m benchmarks NAME [OPTIONS]; the names are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
