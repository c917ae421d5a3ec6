"""Bridges to other trainers, each a file of its own that imports its host lazily."""
