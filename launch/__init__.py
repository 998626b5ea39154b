"""Programs around the start of others: jobs of clusters, supervision, completion in a shell."""
