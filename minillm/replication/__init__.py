"""Methods that keep data-parallel replicas equal: one method a file."""
