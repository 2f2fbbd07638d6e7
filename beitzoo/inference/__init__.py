"""Paths in, one outcome per input out."""
