#!/usr/bin/env python3
"""Sweep the ways to score a suite: see `specforge/bench/suite.py`, or --help."""

import sys

from specforge.bench.suite import main

sys.exit(main())
