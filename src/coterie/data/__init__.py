"""Reading and encoding examples. Never loads weights."""
