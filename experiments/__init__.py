"""Continual-learning runs that log what the bounds need. ``python -m experiments --help``."""
