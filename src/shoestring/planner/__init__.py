"""What fits: the machine, the price of every candidate pipeline before anything runs, and the order to try them in."""
