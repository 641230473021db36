import math

import pytest
import torch
from torch import nn

from mua_rl.adapter.adapters import LoRA
from mua_rl.lr.spec import AlphaRule
from mua_rl.probes.gradient import LayerSums, Probe, coherence

TINY = 1e-6


def heavy_tailed(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64) ** 3


def first_decrease(trained, loss, optimizer):
    """How much one step lowers the loss, per unit of the learning rate."""
    before = loss()
    before.backward()
    optimizer(trained, lr=TINY).step()
    return float(before - loss()) / TINY


def measured(kind, gradient, rank, seed, alpha=1.0, optimizer=torch.optim.Adam):
    """The same for a linear loss with a given gradient in W = α B A."""
    m, n = gradient.shape
    if kind == "full":
        weight = nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
        return first_decrease([weight], lambda: (weight * gradient).sum(), optimizer)
    a, b = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((rank, n), (m, rank)))
    LoRA(rank, kind, AlphaRule(alpha)).draw(a, b, torch.Generator().manual_seed(seed))
    return first_decrease([a, b], lambda: alpha * (b @ a * gradient).sum(), optimizer)


def mean(kind, gradient, rank, **more):
    return sum(measured(kind, gradient, rank, seed, **more) for seed in range(20)) / 20


@pytest.mark.parametrize("m, n", [(32, 128), (96, 48)])
@pytest.mark.parametrize("rank", [2, 8, 16])
def test_the_first_adam_step_gains_what_the_probe_predicts(m, n, rank):
    gradient = heavy_tailed(m, n, rank)
    probe = Probe.of({"w": gradient}, ["w"])
    full = measured("full", gradient, None, 0)
    assert full == pytest.approx(probe.entries, rel=1e-3)
    assert mean("B", gradient, rank) / full == pytest.approx(math.sqrt(rank / probe.m_eff), rel=0.1)
    assert mean("A", gradient, rank, alpha=0.5) / full == pytest.approx(0.5 * rank / probe.n_eff, rel=0.1)


def test_the_first_sgd_step_gains_as_much_at_any_rank():
    gradient = heavy_tailed(64, 64, 0)
    full = measured("full", gradient, None, 0, optimizer=torch.optim.SGD)
    assert full == pytest.approx(float(gradient.square().sum()), rel=1e-3)
    for rank in (2, 8, 32):
        assert mean("B", gradient, rank, optimizer=torch.optim.SGD) / full == pytest.approx(1, rel=0.2)


def test_gaussian_entries_have_the_layers_own_sizes():
    gradient = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    probe = Probe.of({"w": gradient}, ["w"])
    assert probe.m_eff == pytest.approx(200, rel=0.02)
    assert probe.n_eff == pytest.approx(300, rel=0.02)


def test_heavy_tails_make_a_layer_smaller():
    probe = Probe.of({"w": heavy_tailed(200, 300, 0)}, ["w"])
    assert probe.m_eff < 120


def test_layers_are_summed_before_they_are_compared():
    small, large = torch.ones(4, 8), 3 * torch.ones(8, 4)
    probe = Probe.of({"a": small, "b": large, "head": torch.ones(16)}, ["a", "b"])
    assert probe.entries == 32 + 96
    assert probe.full_share == (32 + 96 + 16) / (32 + 96)
    assert probe.layers[0] == LayerSums("a", 4, 8, 32, pytest.approx(16), pytest.approx(4 * math.sqrt(8)))


def test_a_gradient_of_zeros_is_refused():
    with pytest.raises(ValueError, match="zero"):
        Probe.of({"w": torch.zeros(3, 3)}, ["w"])


def test_coherence_is_the_share_of_signs_that_batches_have_in_common():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(400, 400, generator=generator).sign()
    rho = 0.3
    batches = [
        torch.where(torch.rand(400, 400, generator=generator) < (1 + rho) / 2, signal, -signal) for _ in range(2)
    ]
    assert coherence(batches[:1], batches[1:]) == pytest.approx(rho, abs=0.02)
    assert coherence([signal], [signal]) == 1
    assert coherence([signal], [-signal]) == 0
    assert coherence([torch.zeros(3)], [torch.ones(3)]) == 0
