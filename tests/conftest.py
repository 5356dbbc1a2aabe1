"""Settings of all tests."""

import os

# One thread each, here and in the scripts that tests start: tensors are small, and threads that wait for one another
# on a busy machine cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
