"""Continuous batching over a mixed batch of experts. Knows nothing of customers."""
