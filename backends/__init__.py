"""Kernels that implement the contract. They are found by entry point, never imported by name."""
