"""Trained models at work: loading, caches, sampling, generation."""
