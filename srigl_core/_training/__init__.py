"""Training drivers that need no framework."""
