"""The policy in its inference engine: getting the weights there, memory beside it, and what the two disagree on."""
