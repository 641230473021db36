"""What is trained: LoRA or all weights, on which layers, in which parameter groups."""
