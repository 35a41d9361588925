"""What measures speed, memory and staying power; README.md beside this file says how to read the results."""

import lcm_distill  # noqa: F401 - it keeps the libraries' import-time notices out of sight
