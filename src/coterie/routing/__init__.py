"""Which expert a request wakes. Never generates."""
