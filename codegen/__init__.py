"""Outputs: what runs. Reads the plan; knows nothing of prices or passes."""
