"""Settings in, tables out: runs, comparisons, sweeps, statistics."""
