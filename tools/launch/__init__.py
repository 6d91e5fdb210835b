"""Sweeps and studies: what is to be run, where it runs, what became of it."""
