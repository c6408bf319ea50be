"""The condensed format: connections, weights and files."""
