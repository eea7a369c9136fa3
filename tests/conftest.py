"""Settings of all tests: hypothesis is seeded and untimed, so that a run repeats itself on any machine."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, print_blob=True)
settings.load_profile("repeatable")
