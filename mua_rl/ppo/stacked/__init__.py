"""Many PPO trials in one process, their weights stacked."""
