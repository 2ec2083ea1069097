"""Built-in tasks: one small file for each, with the public data set it reads."""
