"""Gradient rows in few bytes: which coordinates are kept, and in how many bits each.

A score is `sum_i u_i g_i` over the coordinates of a basis; u is a query's response and g a document's row. Where coordinates vary
independently, leaving i out costs the squared score E[u_i^2] E[g_i^2], its contribution; storing it in b bits costs that times
the distortion of a b-bit quantiser. So contributions say all: which coordinates to keep, of all layers at once, and how many bits
each gets (reverse water-filling: Cover and Thomas, Elements of Information Theory, section 10.3). A basis in which coordinates
hardly correlate is the curvature's eigenbasis. Multiplying g_i and dividing u_i by the same number changes no score and no
contribution, only how evenly a common step fits the coordinates: half-whitened rows (EOGP) are one such choice.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

MOST_BITS = 8  # of one value


def largest_coordinates(contributions: Float[Tensor, " coordinate"], num: int) -> Int[Tensor, " kept"]:
    """The places of the `num` largest contributions, largest first, the earlier one of equals first.

    Refused with ValueError: there are not as many, or one is negative or not finite.
    """
    _check(contributions, num)
    return contributions.argsort(descending=True, stable=True)[:num]


def largest_rectangles(
    contributions: dict[str, Float[Tensor, "d_out d_in"]], groups: dict[str, str], num: int
) -> tuple[dict[str, Int[Tensor, " k_in"]], dict[str, Int[Tensor, " k_out"]]]:
    """The input sides by group and the output sides by layer of rectangles of large contributions, `num` values or fewer in all.

    What a projection of both sides (LoGra) can keep of a layer is a rectangle, and layers of a group (`groups`, by layer) share
    its input side. Sides grow from nothing, one eigenvector at a time, by what it adds to the contributions per value that it
    adds; ends when nothing that is left fits.

    Raises:
        ValueError: `num` is less than the number of layers.
    """
    if num < len(contributions):
        raise ValueError(f"rows: {num} values for {len(contributions)} layers; expected one for each or more; raise the bytes")
    held = {name: value.double() for name, value in contributions.items()}
    members = {group: [name for name in held if groups[name] == group] for group in dict.fromkeys(groups.values())}
    first = {group: sum(held[name].sum(dim=0) for name in names).argmax() for group, names in members.items()}
    inputs = {group: [int(place)] for group, place in first.items()}
    outputs = {name: [int(value[:, inputs[groups[name]][0]].argmax())] for name, value in held.items()}
    values = len(held)
    while True:
        steps = [_wider(held, members[group], inputs[group], outputs, group) for group in members]
        steps += [_taller(value, name, inputs[groups[name]], outputs[name]) for name, value in held.items()]
        fitting = [step for step in steps if step is not None and values + step[3] <= num]
        if not fitting:
            break
        _rate, (sides, name), place, added = max(fitting, key=lambda step: step[0])
        (inputs if sides == "inputs" else outputs)[name].append(place)
        values += added
    return (
        {group: torch.tensor(places) for group, places in inputs.items()},
        {name: torch.tensor(places) for name, places in outputs.items()},
    )


Step = tuple[float, tuple[str, str], int, int]  # contribution per value, whose side, eigenvector, values


def _wider(
    held: dict[str, Tensor], names: Sequence[str], taken: list[int], outputs: dict[str, list[int]], group: str
) -> Step | None:
    gains = sum(held[name][outputs[name]].sum(dim=0) for name in names)
    return _step(gains, taken, ("inputs", group), added=sum(len(outputs[name]) for name in names))


def _taller(value: Tensor, name: str, inputs: list[int], taken: list[int]) -> Step | None:
    return _step(value[:, inputs].sum(dim=1), taken, ("outputs", name), added=len(inputs))


def _step(gains: Tensor, taken: list[int], side: tuple[str, str], *, added: int) -> Step | None:
    if len(taken) == len(gains):
        return None
    gains = gains.clone()
    gains[taken] = -1.0
    place = int(gains.argmax())
    return float(gains[place]) / added, side, place, added


def allotted_bits(contributions: Float[Tensor, " coordinate"], num_bits: int) -> Int[Tensor, " coordinate"]:
    """Bits of every coordinate, 0 to `MOST_BITS`, `num_bits` in all, that leave the least expected squared error of scores.

    The next bit goes where it takes most away; since every further bit takes less away, that is the best there is.
    Refused with ValueError: the coordinates cannot take as many, or a contribution is negative or not finite.
    """
    _check(contributions, -(-num_bits // MOST_BITS))
    gains = contributions.double()[:, None] * -torch.tensor(np.diff([distortion(bits) for bits in range(MOST_BITS + 1)]))
    best = gains.flatten().argsort(descending=True, stable=True)[:num_bits]
    return torch.bincount(best // MOST_BITS, minlength=len(contributions))


def _check(contributions: Tensor, num: int) -> None:
    if not 0 < num <= len(contributions):
        raise ValueError(f"rows: {num} coordinates asked for; expected from 1 to the {len(contributions)} that there are")
    if not (torch.isfinite(contributions).all() and (contributions >= 0).all()):
        raise ValueError("rows: a contribution is negative or not finite; expected mean squares; look for a diverged checkpoint")


# a quantiser of even steps, none of whose levels is 0: ..., -3/2, -1/2, 1/2, 3/2, ... steps


@functools.cache
def best_step(bits: int) -> float:
    """The step, in standard deviations, with which even levels fit a normal variable best (Max 1960, table II)."""
    return float(minimize_scalar(lambda step: _distortion(step, bits), bounds=(1e-3, 3.0), method="bounded").x)


@functools.cache
def distortion(bits: int) -> float:
    """The mean squared error of a normal variable in so many bits, in its variance; 1 for none."""
    return _distortion(best_step(bits), bits) if bits else 1.0


def _distortion(step: float, bits: int) -> float:
    levels = step * (np.arange(2 ** (bits - 1)) + 0.5)  # those above 0
    low, high = levels - step / 2, np.append(levels[:-1] + step / 2, np.inf)
    mass = norm.cdf(high) - norm.cdf(low)
    first = norm.pdf(low) - norm.pdf(high)  # the integral of x times the density
    return float(1 - 4 * (levels * first).sum() + 2 * (levels**2 * mass).sum())


@dataclass(frozen=True)
class Quantiser:
    """How the values of a row become bits. The row's scale in each group is its root mean square there, in units of `sizes`."""

    bits: Int[Tensor, " value"]  # 1 to `MOST_BITS`
    sizes: Float[Tensor, " value"]  # the usual size of each value: its root mean square over documents
    groups: Int[Tensor, " value"]  # 0, 1, ...: values that share a scale, those of a layer

    @property
    def num_bytes(self) -> int:
        """Bytes of a row: codes, and a float16 scale for every group."""
        return -(-int(self.bits.sum()) // 8) + 2 * (int(self.groups.max()) + 1)

    def encode(self, rows: Float[Tensor, "row value"]) -> tuple[UInt8[Tensor, "row value"], Float[Tensor, "row group"]]:
        """Codes, and scales as float16 holds them."""
        evened = rows / self.sizes
        counts = torch.bincount(self.groups)
        squares = evened.new_zeros(len(rows), len(counts)).index_add_(1, self.groups, evened.square())
        scales = (squares / counts).sqrt().half().to(rows.dtype)
        steps = self._steps(scales)
        below = 2.0 ** (self.bits - 1)
        codes = torch.minimum(torch.maximum((evened / steps).nan_to_num(0.0).floor(), -below), below - 1)
        return (codes + below).to(torch.uint8), scales

    def decode(self, codes: UInt8[Tensor, "row value"], scales: Float[Tensor, "row group"]) -> Float[Tensor, "row value"]:
        """The rows that `encode` was given, nearly."""
        return (codes - (2.0 ** (self.bits - 1)) + 0.5) * self._steps(scales) * self.sizes

    def _steps(self, scales: Float[Tensor, "row group"]) -> Float[Tensor, "row value"]:
        steps = torch.tensor([0.0, *(best_step(bits) for bits in range(1, MOST_BITS + 1))], dtype=scales.dtype)
        return scales[:, self.groups] * steps[self.bits]


def pack_codes(codes: UInt8[np.ndarray, "row value"], bits: Int[np.ndarray, " value"]) -> UInt8[np.ndarray, "row byte"]:
    """Codes as bytes: a plane for every bit, the highest first, of the values that have it."""
    planes = [(codes[:, bits > plane] >> (bits[bits > plane] - 1 - plane)) & 1 for plane in range(MOST_BITS)]
    return np.packbits(np.concatenate(planes, axis=1).astype(np.uint8), axis=1)


def unpack_codes(packed: UInt8[np.ndarray, "row byte"], bits: Int[np.ndarray, " value"]) -> UInt8[np.ndarray, "row value"]:
    """`pack_codes` undone."""
    held = np.unpackbits(packed, axis=1, count=int(bits.sum()))
    codes = np.zeros((len(packed), len(bits)), np.uint8)
    start = 0
    for plane in range(MOST_BITS):
        having = np.flatnonzero(bits > plane)
        codes[:, having] = codes[:, having] << 1 | held[:, start : start + len(having)]
        start += len(having)
    return codes
