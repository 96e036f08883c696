"""Decisions: which option is best, by :mod:`cost_models`."""
