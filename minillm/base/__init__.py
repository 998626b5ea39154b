"""Ground floor: errors, arrays and devices, flags, logging, random numbers, traces."""
