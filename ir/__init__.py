"""Nouns: what is planned. Imports nothing else of the project."""
