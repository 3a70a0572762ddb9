"""Two towers of a toy CLIP as ONNX files, written field by field: onnx is no dependency.

The image tower gives the mean of each colour, the text tower the mean of its tokens' vectors.
"""

import numpy as np

FLOAT, INT64 = 1, 7


def _varint(n):
    out = b""
    while True:
        out += bytes([n & 127 | (128 if n > 127 else 0)])
        n >>= 7
        if not n:
            return out


def _field(number, value):
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _value(name, kind, *dims):
    shape = b"".join(_field(1, _field(1, d) if isinstance(d, int) else _field(2, d)) for d in dims)
    return _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, shape)))


def _node(op, inputs, output, attributes=b""):
    return b"".join(_field(1, i) for i in inputs) + _field(2, output) + _field(4, op) + attributes


def _mean(source, output, axes):
    ints = b"".join(_field(8, axis) for axis in axes)
    attributes = _field(5, _field(1, "axes") + ints + _field(20, 7))
    attributes += _field(5, _field(1, "keepdims") + _field(3, 0) + _field(20, 2))
    return _node("ReduceMean", [source], output, attributes)


def _model(nodes, given, made, constants=()):
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "toy")
    for name, array in constants:
        dims = b"".join(_field(1, d) for d in array.shape)
        graph += _field(5, dims + _field(2, FLOAT) + _field(8, name) + _field(9, array.tobytes()))
    graph += _field(11, given) + _field(12, made)
    return _field(1, 8) + _field(8, _field(2, 11)) + _field(7, graph)


def image_tower():
    return _model(
        [_mean("pixel_values", "image_embeds", (2, 3))],
        _value("pixel_values", FLOAT, "n", 3, "h", "w"),
        _value("image_embeds", FLOAT, "n", 3),
    )


def text_tower(vectors):
    """vectors: float32 (tokens, 3)."""
    return _model(
        [_node("Gather", ["vectors", "input_ids"], "found"), _mean("found", "text_embeds", (1,))],
        _value("input_ids", INT64, "n", "l"),
        _value("text_embeds", FLOAT, "n", 3),
        [("vectors", np.asarray(vectors, np.float32))],
    )
