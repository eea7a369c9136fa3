"""Settings of all tests: hypothesis is seeded and untimed, so that a run repeats itself on any machine; Triton
interprets its kernels, which needs no GPU and must be said before they are imported.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, print_blob=True)
os.environ["TRITON_INTERPRET"] = "1"
settings.load_profile("repeatable")
