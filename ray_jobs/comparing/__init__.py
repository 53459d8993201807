"""What `ray_jobs/compare.py` does."""
