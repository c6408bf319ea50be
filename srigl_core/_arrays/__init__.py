"""Arrays: dtypes, checks, and the array libraries that callers use."""
