"""Alternate growth and pruning in a running training: layers that really become narrower and wider."""
