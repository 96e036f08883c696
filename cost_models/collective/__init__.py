"""Closed forms of collectives; :mod:`cost_models.collective.algorithms` names and prices all of them."""
