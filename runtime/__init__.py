"""Mesh, train state, optimizer, checkpoints, input feeding, writers, clock. Knows no model."""
