"""Kernels behind the contract; found by entry point, never imported by name."""
