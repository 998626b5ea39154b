"""Metrics of texts against references: sums over sentences, and formulas of these sums."""
