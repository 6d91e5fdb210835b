"""Whole networks built from layers."""
