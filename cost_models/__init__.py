"""Prices: how long and how big. Pure functions over :mod:`ir`."""
