"""What can be trained: one module per task."""
