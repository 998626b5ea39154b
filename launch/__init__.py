"""Programs around the start of others: completion in a shell."""
