"""Learning-rate sweeps: which arms to run, how they are run, and what they say about the best learning rate."""
