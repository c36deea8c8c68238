"""Benchmarks, run by `make bench`: each measure beside the monolith and beside its floor, in one run, as ratios."""
