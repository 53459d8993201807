"""How many CPUs this process may use."""


def available_cpus() -> int:
    """CPUs by affinity and by a container's limit (cgroup quota), at least 1.

    `os.cpu_count` tells those of the host. A pod with two of 64 that starts 64 threads is stopped by the kernel for
    most of each period while its threads wait for each other.
    """
    import joblib  # type: ignore[import-untyped]

    return int(joblib.cpu_count())
