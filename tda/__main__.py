"""`python -m tda` is `tda`."""

import sys

from tda.cli import main

if __name__ == "__main__":
    sys.exit(main())
