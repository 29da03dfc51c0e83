"""One module a bench: `arguments(parser)` says what it takes, `run(given)` measures and returns the exit code."""
