"""Measuring models on examples, with confidence intervals. Changes no expert."""
