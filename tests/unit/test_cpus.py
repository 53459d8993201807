"""CPUs that may be used, not those of the host."""

import os
import subprocess
import sys

from audiomae.cpus import available_cpus

IN_ONE_CPU = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from audiomae.cpus import available_cpus
print(available_cpus())
"""


def test_a_process_that_may_use_one_cpu_has_one_however_many_the_host_has() -> None:
    assert 1 <= available_cpus() <= (os.cpu_count() or 1)
    done = subprocess.run([sys.executable, "-c", IN_ONE_CPU], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
