"""What dispatch and combine cost when experts lie on several devices: bytes and time on the chip's links.

A prediction for groups of devices inside the nearest link's domain, experts spread evenly: each token's row goes once to
each device that has one of its experts, and the sums come back. Where experts are placed is another matter.
"""

from __future__ import annotations

from typing import Any

from ..chip.chip import Link as ChipLink
from ..chip.chip import Profile
from ..kernels.comm import Exchange, Link, distinct_devices, exchange_seconds, row_bytes, sent_bytes
from ..kernels.experts import Experts
from ..predict.assumed import link_latency

GROUPS = (2, 8, 64)  # devices of a group, and the whole domain
DISPATCHED, COMBINED = ("fp8", "int8", "bf16"), "bf16"


def exchange_entries(e: Experts, profile: Profile, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return what one layer's experts cost on the nearest link for `tokens` tokens of each device; nothing where the
    chip has no link or its bandwidth is unknown."""
    near = next((link for link in profile.links if link.bandwidth and link.domain), None)
    if near is None:
        return []
    assert near.bandwidth and near.domain
    rate = (near.measured or near.bandwidth).value
    link = Link(rate, link_latency(near), int(near.domain.value))
    sizes = sorted({*GROUPS, link.domain})
    groups = [n for n in sizes if 1 < n <= link.domain and e.experts % n == 0]
    return [_group_entry(e, profile, near, link, devices, tokens) for devices in groups]


def _group_entry(
    e: Experts, profile: Profile, near: ChipLink, link: Link, devices: int, tokens: tuple[int, ...]
) -> dict[str, Any]:
    dtype = next(d for d in DISPATCHED if d == "bf16" or {"fp8": "f8e4m3", "int8": "i8"}[d] in profile.formats)
    rows = {"dispatch": row_bytes(dtype, e.hidden), "combine": row_bytes(COMBINED, e.hidden)}
    steps = []
    for count in tokens:
        exchange = Exchange(count, e.chosen, e.experts, devices, e.hidden)
        found = {
            name: {"bytes": sent_bytes(exchange, row), "time": exchange_seconds(exchange, row, link)}
            for name, row in rows.items()
        }
        steps.append({"tokens": count, **found})
    return {
        "devices": devices,
        "link": near.name,
        "bandwidth": link.bandwidth,
        "measured": near.measured is not None,
        "latency": near.latency.value if near.latency else None,
        "dtypes": {"dispatch": dtype, "combine": COMBINED},
        "devices_of_a_token": distinct_devices(e.experts, e.chosen, devices),
        "steps": steps,
    }
