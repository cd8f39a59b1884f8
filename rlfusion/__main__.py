"""``python -m rlfusion``, for where there is no ``rlfusion`` on the PATH: it is the same command."""

import sys

from rlfusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
