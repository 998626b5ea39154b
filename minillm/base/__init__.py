"""Ground floor: errors, arrays, devices, options and flags, logging, random numbers, traces."""
