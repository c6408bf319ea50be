"""Measurements of the kernels beside what else one could use: ``srigl bench``."""
