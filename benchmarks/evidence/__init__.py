"""The project's evidence: every method and setting on the embedded world, over seeds. `python -m benchmarks.evidence --help`."""
