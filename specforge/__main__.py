"""`python -m specforge`."""

from specforge.cli.__main__ import run_and_exit

run_and_exit()
