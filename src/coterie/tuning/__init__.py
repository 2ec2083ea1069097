"""The training loop. Serves nothing."""
