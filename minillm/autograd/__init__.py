"""Reverse-mode automatic differentiation: the tape and the backward pass."""
