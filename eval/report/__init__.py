"""Reports from result files: table, Pareto picture, one self-contained page."""
