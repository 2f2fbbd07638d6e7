"""From a source to a strict state dict, and back out."""
