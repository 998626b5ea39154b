"""Scaled dot-product attention under any interval of visible keys; see README.md."""
