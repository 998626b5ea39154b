"""Campaigns: random kills, damaged input, odd machines and long runs, by `python -m campaigns`."""
