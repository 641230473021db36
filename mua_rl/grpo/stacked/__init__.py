"""Many GRPO trials in one process, on one frozen base."""
