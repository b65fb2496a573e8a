"""Layers of which each rank holds its own part."""
