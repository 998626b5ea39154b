"""Programs around the start of others: jobs of clusters, completion in a shell."""
