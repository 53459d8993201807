"""How good the vectors are: retrieval metrics, paired comparison of runs, baselines, plots and one HTML report."""
