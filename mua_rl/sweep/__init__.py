"""Learning-rate sweeps: which trials to run, how they are run, and what they say about the best learning rate."""
