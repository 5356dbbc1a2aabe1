"""Imported by scripts before torch, whose import takes seconds: what has to be settled first.

OpenMP's threads sleep while they wait for each other: on a machine whose cores do other work too, threads that spin
instead take them from the very threads they wait for. Ctrl-C ends the script without a traceback, until
`util.train.signals.raise_on_interrupt`. What the console cannot show is shown as Python escapes it: a name is no error.
"""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the process was started to ignore it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if hasattr(sys.stdout, "reconfigure"):  # None where it is closed
    sys.stdout.reconfigure(errors="backslashreplace")
