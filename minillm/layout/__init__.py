"""Pure arithmetic of meshes and shards: no ranks, no allocation."""
