"""Networks; they know nothing of names, files or images."""
