"""Probes, generation and reports on any run."""
