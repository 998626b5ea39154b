"""Starting runs on machines and clusters. `mpirun` on one machine needs nothing from here."""
