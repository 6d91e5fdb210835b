"""The pod check: a run's programs compiled ahead of time for a named TPU topology, without a TPU."""
