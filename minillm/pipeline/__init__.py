"""Pipeline schedules as data, and the loop that executes any of them."""
