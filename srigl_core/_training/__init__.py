"""Training drivers, free of frameworks."""
