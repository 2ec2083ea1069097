"""Kinds of expert and the library that keeps them. Trains nothing."""
