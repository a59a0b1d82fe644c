"""Plans: steps compiled for hardware that need not be present, and the search for the best configuration."""
