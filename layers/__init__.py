"""Sequence mixers and building blocks: thin modules, projections plus one op."""
