"""The paper's experiments in small: a grid of training runs, its results, and what they say."""
