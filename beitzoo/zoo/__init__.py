"""Facts about models, and questions about facts; no torch."""
