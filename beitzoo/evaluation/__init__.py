"""How right a model is on labelled images."""
