"""Identity, roles, private data, encryption, retention, erasure."""
