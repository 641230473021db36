"""PPO on control tasks, on stable-baselines3."""
