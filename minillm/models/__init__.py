"""Model families: one definition for every mesh, one file a family."""
