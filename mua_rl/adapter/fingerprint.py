"""Whether two models have the same weights, told by a short hash."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights, the same in whatever precision and wrapping they were loaded.

    It reads the name, the shape and up to 64 evenly spaced values of every parameter, rounded to bf16's precision.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = weight.detach().flatten()
            sample = values[:: max(1, len(values) // 64)][:64].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
