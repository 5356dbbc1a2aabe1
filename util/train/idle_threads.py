"""Imported by scripts before torch: OpenMP's threads sleep while they wait for each other.

On a machine whose cores do other work too, threads that spin instead take them from the very threads they wait for.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
