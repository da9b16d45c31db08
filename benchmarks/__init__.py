"""Speed, side by side in one process and run, as ratios of medians: `python -m benchmarks`."""
