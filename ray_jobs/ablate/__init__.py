"""The rows of an ablation and how one of them is run."""
