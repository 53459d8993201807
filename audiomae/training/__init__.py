"""How the model learns: losses, augmentations, objectives, schedules, collapse gauges, and the loop that uses them.

Nothing here imports ray: `ray_jobs/train.py` runs `loop.train` inside Ray Train workers, and a test or a notebook can
run the same loop in one process.
"""
