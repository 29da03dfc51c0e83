"""`python -m specforge`."""

import sys

from specforge.cli.__main__ import main

sys.exit(main())
