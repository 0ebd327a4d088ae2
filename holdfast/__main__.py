"""`python -m holdfast`: the same as the command `holdfast`."""

import sys

from holdfast.cli import main

if __name__ == "__main__":
    sys.argv[0] = "holdfast"  # records tell what to repeat
    sys.exit(main())
