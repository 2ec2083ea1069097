"""Coterie: one small open language model made into a coterie of experts for a business."""

__version__ = "0.1.0"
