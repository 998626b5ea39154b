"""Trained models at work: loading, sampling, generation."""
