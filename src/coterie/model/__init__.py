"""The base model: decoder, loading, chat template, pulling. Knows nothing of requests."""
