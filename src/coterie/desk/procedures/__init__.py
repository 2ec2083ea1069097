"""Procedures: guided flows that a business declares in a file. Code decides every step of them, never a model."""
