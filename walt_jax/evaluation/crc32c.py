"""CRC-32C (Castagnoli), the checksum that TensorFlow's checkpoints keep of each tensor.

A checksum is linear over bits: the message is cut into lanes whose checksums NumPy computes side by
side, a byte of each at a time, and pairs of lanes are joined until one is left.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed


def crc32c(data: bytes) -> int:
    """The checksum of at least 4 bytes."""
    message = np.frombuffer(data, np.uint8).copy()
    message[:4] ^= 255  # as if the register began with ones; then leading zeros change nothing
    lanes = 1 << max(0, (len(message).bit_length() - 1) // 2)
    length = -(-len(message) // lanes)
    message = np.concatenate([np.zeros(lanes * length - len(message), np.uint8), message])
    registers = _run(np.zeros(lanes, np.uint32), np.ascontiguousarray(message.reshape(lanes, -1).T))
    # What so many zero bytes make of a register's 32 bits.
    shift = _run(np.uint32(1) << np.arange(32, dtype=np.uint32), np.zeros((length, 1), np.uint8))
    while len(registers) > 1:
        registers = _apply(shift, registers[::2]) ^ registers[1::2]
        shift = _apply(shift, shift)
    return int(registers[0]) ^ 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return values


def _run(registers: np.ndarray, message: np.ndarray) -> np.ndarray:
    """Feeds rows of a message, a byte a register."""
    table = _table()
    for row in message:
        registers = table[(registers ^ row) & 255] ^ (registers >> 8)
    return registers


def _apply(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """The linear map that takes bit i to `columns[i]`."""
    bits = (registers[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits, columns, np.uint32(0)), axis=1)
