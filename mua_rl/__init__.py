"""Reinforcement-learning finetuning with one learning rate for every LoRA rank and for full finetuning."""

__version__ = "0.1.0"
