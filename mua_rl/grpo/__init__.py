"""GRPO with verifiable rewards, on TRL."""
