"""Kernels of hyper-connections, on a chip of every family, equal the reference ops."""

import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, run
from moec.compiler.ops.hyper_connections import hyper_connection_head, hyper_connection_post, hyper_connection_pre
from moec.targets.accelerator.kernels.choices import RowTile, Tile
from moec.targets.accelerator.kernels.hyper import Streams, stream_scores, streams_in, streams_out

chips = pytest.mark.parametrize("name", CHIPS)


@chips
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("streams", "width", "tokens", "iterations"), [(4, 24, 5, 20), (3, 40, 1, 2), (2, 16, 7, 1)])
def test_the_way_through_a_sublayer(name, split, streams, width, tokens, iterations):
    layout, chip = CHIPS[name]
    torch.manual_seed(streams)
    p = Streams(streams, width, 1e-6, 1e-3, iterations, dtype="f32")
    x, w = torch.randn(tokens, streams, width), torch.randn(p.scores, streams * width) * 0.3
    base, scale = torch.randn(p.scores), torch.randn(3)
    y, post, mix = hyper_connection_pre(x[None], w, base, scale, eps=1e-6, floor=1e-3, iterations=iterations)
    scalars = {"T": tokens}
    scores = run(stream_scores(p, Tile(16, 0, 16), layout, split), chip, scalars, x=x, w=w)
    found = run(streams_in(p, RowTile(4, 16), layout, split), chip, scalars, x=x, base=base, scale=scale, **scores)
    close(found["y"], y)
    close(found["post"], post)
    close(found["mix"], mix)
    out = torch.randn(tokens, width)
    given = {"x": out, "streams": x, "post": found["post"], "mix": found["mix"]}
    back = run(streams_out(p, RowTile(4, 16), layout), chip, scalars, **given)["y"]
    close(back, hyper_connection_post(out[None], x[None], post, mix))


@chips
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_head(name, dtype):
    layout, chip = CHIPS[name]
    torch.manual_seed(1)
    p = Streams(4, 40, 1e-6, 1e-3, head=True, dtype=dtype)
    x, w, base, scale = torch.randn(6, 4, 40), torch.randn(4, 160) * 0.3, torch.randn(4), torch.randn(1)
    x = bf16(x) if dtype == "bf16" else x
    scores = run(stream_scores(p, Tile(16, 0, 32), layout, 2), chip, {"T": 6}, x=x, w=w)
    y = run(streams_in(p, RowTile(4, 32), layout, 2), chip, {"T": 6}, x=x, base=base, scale=scale, **scores)["y"]
    close(y, hyper_connection_head(x[None], w, base, scale, eps=1e-6, floor=1e-3), 4e-3 if dtype == "bf16" else 2e-5)
