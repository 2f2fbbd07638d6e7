"""beitzoo."""
