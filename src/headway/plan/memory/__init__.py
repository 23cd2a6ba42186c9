"""The cheapest way to train a recipe within a number of bytes: candidates, a probe of each, and the choice."""
