"""What measures speed, memory and staying power; README.md beside this file says how to read the results."""
