"""Measurements of the CPU kernels beside what else one could use: ``srigl bench``."""
