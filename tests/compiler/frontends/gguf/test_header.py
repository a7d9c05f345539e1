"""Headers of GGUF files that are damaged, lie, or would take a lot of memory: one message, exit code 2."""

import struct

import gguf_files
import pytest
from moec.compiler.errors import MoecError
from moec.compiler.weights.sources.gguf import LongArray, open_gguf


def header(*pairs, tensors=0):
    """Return a header with keys whose bytes are given."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(pairs)


def array(inner, count, raw=b""):
    return gguf_files.string("a.key") + struct.pack("<IIQ", 9, inner, count) + raw


HEADERS = {
    "has no valid array": header(array(9, 1, struct.pack("<IQ", 9, 1) * 50)),  # lists in lists
    "the key 'a.key' has no valid array": header(array(4, 1 << 40)),
    "truncated": header(array(4, 1 << 20)),
    "the key 'a.key' is there twice": header(*[array(4, 0)] * 2),
    "the header announces 0 tensors and 4294967296 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 32),
    "has the unknown type 77": header(gguf_files.string("a.key") + struct.pack("<I", 77)),
    "a string of 70000 bytes": header(gguf_files.string("k" * 70000)),
}


@pytest.mark.parametrize("message", HEADERS)
def test_headers_that_cannot_be(message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(HEADERS[message])
    with pytest.raises(MoecError, match=message) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert caught.value.exit_code == 2


def test_long_arrays_are_counted(tmp_path):
    pairs = (array(12, 5000, bytes(40000)), array(8, 5000, gguf_files.string("t") * 5000).replace(b"a.key", b"b.key"))
    (tmp_path / "m.gguf").write_bytes(header(*pairs) + bytes(64))
    assert dict(open_gguf(tmp_path / "m.gguf").metadata) == {"a.key": LongArray(5000), "b.key": LongArray(5000)}


def test_a_part_with_another_name(tmp_path):
    file = gguf_files.write(tmp_path / "renamed.gguf", {"split.count": 3, "split.no": 0}, {})
    with pytest.raises(MoecError, match=r"this is part 1 of 3 parts, by split\.count, and of 1 by its name"):
        open_gguf(file)
