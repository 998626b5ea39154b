"""Modules, parameters and their flat storage."""
