"""Arithmetic of meshes, stages and shards. Needs no running ranks and allocates nothing."""
