"""Dispatch and combine across devices: how many bytes go from one device to each other one, and how long that takes.

Experts lie spread evenly over the devices of a group, in the order of their numbers. A token's row goes either once for
each choice, to a slot of its expert (`each_choice`, low latency), or once to each device that has one of its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from ....compiler.errors import MoecError

GROUP = 128  # values of a row that share a scale in fp8


@dataclass(frozen=True)
class Exchange:
    """T tokens a device, each with `chosen` of `experts` experts on `devices` devices, and rows of `hidden` values."""

    tokens: float
    chosen: int
    experts: int
    devices: int
    hidden: int
    each_choice: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be spread: MoecError where the experts do not divide by the devices."""
        if self.devices < 1 or self.experts % self.devices or not 0 < self.chosen <= self.experts:
            raise MoecError(
                f"{self.chosen} of {self.experts} experts on {self.devices} devices, which must divide them"
            )


@dataclass(frozen=True)
class Link:
    """A link of a device to others: bytes a second in one direction, seconds until the first arrive, devices so linked."""

    bandwidth: float
    latency: float
    domain: int


def row_bytes(dtype: str, hidden: int, header: int = 0) -> int:
    """Return the bytes of a row as it is sent: bf16, or fp8 or int8 with an f32 scale for each 128 values, and a header.

    DeepEP's low latency kernels send fp8 rows with a header of 16 bytes (its tests/test_low_latency.py counts hidden +
    hidden / 128 * 4 + 16 for dispatch and 2 hidden for combine). MoecError for another dtype.
    """
    if dtype in ("fp8", "int8"):
        return hidden + 4 * -(-hidden // GROUP) + header
    if dtype not in ("bf16", "f16"):
        raise MoecError(f"rows of {dtype} are not sent", todo="fp8, int8, bf16 and f16 are")
    return 2 * hidden + header


def probability_of_device(experts: int, chosen: int, devices: int) -> float:
    """Return the probability that one device has an expert of a token: 1 - C(E - E / N, k) / C(E, k).

    All sets of k experts are equally likely; missing the E / N experts of a device is the hypergeometric distribution
    at 0 (Feller, An Introduction to Probability Theory and Its Applications, vol. 1, II.6).
    """
    return 1 - comb(experts - experts // devices, chosen) / comb(experts, chosen)


def distinct_devices(experts: int, chosen: int, devices: int) -> float:
    """Return on how many devices a token's experts lie, in the mean: N times the probability for one of them."""
    return devices * probability_of_device(experts, chosen, devices)


def rows_to_each(e: Exchange) -> float:
    """Return how many rows one device sends to each device in the mean, itself among them."""
    if e.each_choice:
        return e.tokens * e.chosen / e.devices
    return e.tokens * probability_of_device(e.experts, e.chosen, e.devices)


def sent_bytes(e: Exchange, row: float, first: int = 1) -> float:
    """Return the bytes that go from a device to those behind the nearest `first`, by default to all but itself."""
    return rows_to_each(e) * (e.devices - min(first, e.devices)) * row


def exchange_seconds(e: Exchange, row: float, near: Link, far: Link | None = None, forwarded: bool = False) -> float:
    """Return the time of a dispatch or combine: the slower of the links, at bytes / bandwidth, and the longest latency.

    Devices of one domain are linked by `near`, others by `far`. `forwarded`: a row goes once to each other domain that
    wants it and from there on by `near`, as DeepEP's normal kernels do it; else it goes to each device by itself.
    MoecError where there are devices that no link reaches.
    """
    if e.devices <= near.domain:
        return sent_bytes(e, row) / near.bandwidth + (near.latency if e.devices > 1 else 0)
    if far is None or e.devices > far.domain:
        raise MoecError(f"{e.devices} devices, but the links reach {(far or near).domain}")
    if e.devices % near.domain:
        raise MoecError(f"{e.devices} devices do not divide into domains of {near.domain}")
    near_bytes, far_bytes = sent_bytes(e, row) - sent_bytes(e, row, near.domain), sent_bytes(e, row, near.domain)
    if forwarded:
        domains = e.devices // near.domain
        far_bytes = e.tokens * probability_of_device(e.experts, e.chosen, domains) * (domains - 1) * row
        near_bytes = sent_bytes(e, row)  # each row also takes the way inside of its domain
    return max(near_bytes / near.bandwidth, far_bytes / far.bandwidth) + max(near.latency, far.latency)
