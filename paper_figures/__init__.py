"""Figures from run logs; reads files, never trains. ``python -m paper_figures --help``."""
