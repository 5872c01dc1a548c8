import torch

from tda.ekfac import EKFAC
from tda.factors import SegmentFactors, load_factors, save_factors
from tda.model import Layer


def some_factors() -> SegmentFactors:
    generator = torch.Generator().manual_seed(0)
    layers = [Layer(f"layer.{number}", 4, 3, False, "layer.0") for number in range(2)]
    Q_A = torch.rand(4, 4, generator=generator)
    plain = {
        layer.name: EKFAC(Q_A, torch.rand(3, 3, generator=generator), torch.rand(3, 4, generator=generator)) for layer in layers
    }
    return SegmentFactors(layers, plain, {}, {layer.name: torch.ones(3, 4) for layer in layers}, {}, 7)


def test_factors_come_back_and_equal_factors_are_equal_bytes(tmp_path):
    """Twelve writes: two keys of metadata, in an order of chance, would all agree once in two thousand times."""
    factors = some_factors()
    written = []
    for number in range(12):
        save_factors(tmp_path / f"{number}.safetensors", factors)
        written.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(set(written)) == 1
    loaded = load_factors(tmp_path / "0.safetensors")
    assert loaded.layers == factors.layers
    assert loaded.num_documents == 7
    for name, held in factors.plain.items():
        torch.testing.assert_close(loaded.plain[name].Lambda, held.Lambda)
        torch.testing.assert_close(loaded.plain[name].Q_A, held.Q_A)
        torch.testing.assert_close(loaded.P[name], factors.P[name])
