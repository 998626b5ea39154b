"""Collectives and regions that cut a model over ranks: one method a file."""
