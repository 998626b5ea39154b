"""Methods that keep the data-parallel replicas equal: one file each."""
