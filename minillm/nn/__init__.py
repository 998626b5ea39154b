"""Layers of neural networks, built from operations and regions."""
