"""The error-bounded codecs in numpy, and the layout of what they write.

``_native/codecs.c`` writes the same bytes in one call; this path serves machines without a compiler and is
what the compiled one is compared with. A body, little endian::

    u32 exact, u32 distinct          elements carried exactly; vectors sent (all of them without LZ)
    exact x (u32 position, f32)      what no code holds within the bound: non-finite, huge
    array of rows references         only with LZ: 0 for a new vector, else 1 + its place among the new ones
    array of distinct x dim codes    x = code * 2 * bound; the float's own bits where nothing may be lost

Without an entropy coder an array is ``i32 least, u8 width`` and the codes less the least in ``width`` bits
each, least significant bit first. With one, codes (zigzag: 0, -1, 1, -2, ...) become tokens, values under 256
as they are, larger ones as their bit length and two bits after the leading one, the rest in plain bits; and
tokens are coded by rANS (J. Duda, arXiv 1311.2540) with frequencies of sum 2^12, states of 32 bits, words of
16 bits, and 4 states in turn (32 from 8192 tokens on)::

    u16 listed, bytes of frequencies (0 and a count for a run of zeros; one byte below 128, else two)
    u32 state x 4 or 32, u32 words, u32 bytes of plain bits, words, plain bits
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

LZ, RANS, LOSSLESS = 1, 2, 4  # stages, as in codecs.c
DIRECT, ALPHABET = 256, 352
SCALE_BITS = 12
SCALE = 1 << SCALE_BITS
LOW = 1 << 16
CODE_LIMIT = 2.0**30

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int32]
Array = npt.NDArray[Any]


class Corrupt(Exception):
    """A body that no encoder wrote; callers say what it means for people."""


def quantise(x: npt.NDArray[np.float32], bound: float) -> tuple[Codes, Array]:
    """Codes of ``x`` (flat), and the positions of elements that no code holds within ``bound``."""
    step = 2 * bound
    with np.errstate(all="ignore"):
        value = x.astype(np.float64)
        scaled = value * (1 / step)
        fits = (scaled < CODE_LIMIT) & (scaled > -CODE_LIMIT)
        whole = np.rint(np.where(fits, scaled, 0))
        error = value - (whole * step).astype(np.float32).astype(np.float64)
        held = fits & (error <= bound) & (error >= -bound)
    return np.where(held, whole, 0).astype(np.int32), np.flatnonzero(~held)


def restore(codes: Codes, bound: float) -> npt.NDArray[np.float32]:
    """Values of codes."""
    with np.errstate(all="ignore"):
        values: npt.NDArray[np.float32] = (codes * (2 * bound)).astype(np.float32)
    return values


def find_repeats(codes: Codes) -> tuple[npt.NDArray[np.uint32], Array]:
    """References of each vector of ``codes`` (rows, dim), and the rows of those that are new."""
    whole = np.ascontiguousarray(codes).view(np.dtype((np.void, 4 * codes.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty(len(first), np.int64)
    place[order] = np.arange(len(first))
    refs = place[inverse] + 1
    new = first[order]
    refs[new] = 0
    return refs.astype(np.uint32), new


# ---- arrays of fixed width ----


def pack(values: Codes) -> bytes:
    """An array of fixed width."""
    low, high = int(values.min()), int(values.max())
    width = (high - low).bit_length()
    bits = _to_bits((values.astype(np.int64) - low).astype(np.uint64), np.full(len(values), width))
    return struct.pack("<iB", low, width) + bits


def unpack(reader: Reader, count: int) -> Codes:
    """The inverse of :func:`pack`."""
    low, width = struct.unpack("<iB", reader.take(5))
    if width > 32:
        raise Corrupt
    data = reader.take((count * width + 7) // 8)
    values = _from_bits(data, np.full(count, width))
    codes: Codes = (values.astype(np.int64) + low).astype(np.uint32).view(np.int32)
    return codes


def _to_bits(values: npt.NDArray[np.uint64], widths: Array) -> bytes:
    """Each value in its own number of bits, least significant first."""
    at, offset = _spread(widths)
    bits = (values[at] >> offset.astype(np.uint64)) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _from_bits(data: bytes, widths: Array) -> npt.NDArray[np.uint64]:
    at, offset = _spread(widths)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: len(at)].astype(np.uint64)
    values = np.zeros(len(widths), np.uint64)
    np.add.at(values, at, bits << offset.astype(np.uint64))
    return values


def _spread(widths: Array) -> tuple[Array, Array]:
    """For every bit the value it belongs to and its place in it."""
    at = np.repeat(np.arange(len(widths)), widths)
    starts = np.cumsum(widths) - widths
    return at, np.arange(len(at)) - starts[at]


# ---- arrays under the entropy coder ----


def zigzag(values: Codes) -> npt.NDArray[np.uint32]:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    wide = values.astype(np.int64)
    return np.where(wide < 0, -2 * wide - 1, 2 * wide).astype(np.uint32)


def zagzig(values: Array) -> Codes:
    """The inverse of :func:`zigzag`."""
    wide = values.astype(np.int64)
    return np.where(wide & 1, -(wide + 1) // 2, wide // 2).astype(np.int32)


def tokens_of(values: Array) -> tuple[Array, Array, Array]:
    """Tokens of unsigned values, and the plain bits of those that have any with their widths."""
    wide = values.astype(np.int64)
    length = np.frexp(wide.astype(np.float64))[1].astype(np.int64)  # exact: values are below 2^53
    large = wide >= DIRECT
    bucket = DIRECT + (length - 9) * 4 + ((wide >> np.maximum(length - 3, 0)) & 3)
    widths = length[large] - 3
    return np.where(large, bucket, wide), wide[large] & ((1 << widths) - 1), widths


def frequencies_of(count: Array) -> Array:
    """Counts of the 352 tokens as frequencies of sum 2^12, at least 1 for each that occurs."""
    total = int(count.sum())
    freq = np.where(count > 0, np.maximum((count * SCALE + total // 2) // total, 1), 0)
    excess = int(freq.sum()) - SCALE
    while excess:
        top = int(np.argmax(freq))
        room = int(freq[top]) - int(freq[top]) // 2 - int(freq[top] == 1)
        change = min(excess, room)
        freq[top] -= change
        excess -= change
    return freq


def write_frequencies(freq: Array) -> bytes:
    """The table of frequencies."""
    listed = int(np.flatnonzero(freq)[-1]) + 1
    out = bytearray(struct.pack("<H", listed))
    at = 0
    while at < listed:
        value = int(freq[at])
        if value:
            out += bytes([value]) if value < 128 else bytes([128 | value >> 8, value & 255])
            at += 1
            continue
        run = 0
        while run < 255 and freq[at] == 0:
            run, at = run + 1, at + 1
        out += bytes([0, run])
    return bytes(out)


def _read_frequencies(reader: Reader) -> Array:
    freq = np.zeros(ALPHABET, np.int64)
    (listed,) = struct.unpack("<H", reader.take(2))
    at = 0
    while at < listed <= ALPHABET:
        value = reader.take(1)[0]
        if value == 0:
            run = reader.take(1)[0]
            if not 0 < run <= listed - at:
                raise Corrupt
            at += run
            continue
        freq[at] = value if value < 128 else (value & 127) << 8 | reader.take(1)[0]
        at += 1
    if listed > ALPHABET or freq.sum() != SCALE:
        raise Corrupt
    return freq


def _lanes(count: int) -> int:
    return 4 if count < 8192 else 32


def entropy_code(values: Array) -> bytes:
    """An array of unsigned values under the entropy coder."""
    if not len(values):
        return b""
    tokens, plain, widths = tokens_of(values)
    freq = frequencies_of(np.bincount(tokens, minlength=ALPHABET))
    start = np.cumsum(freq) - freq
    lanes = _lanes(len(tokens))
    states = np.full(lanes, LOW, np.uint64)
    words: list[Array] = []
    for base in range((len(tokens) - 1) // lanes * lanes, -1, -lanes):
        part = tokens[base : base + lanes]
        x, f = states[: len(part)], freq[part].astype(np.uint64)
        full = x >= f << np.uint64(20)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(part)] = (x // f << np.uint64(SCALE_BITS)) + x % f + start[part].astype(np.uint64)
    stream = np.concatenate(words[::-1])
    bits = _to_bits(plain.astype(np.uint64), widths)
    head = write_frequencies(freq) + states.astype("<u4").tobytes()
    return head + struct.pack("<II", len(stream), len(bits)) + stream.tobytes() + bits


def entropy_decode(reader: Reader, count: int) -> npt.NDArray[np.uint32]:
    """The inverse of :func:`entropy_code`."""
    if not count:
        return np.zeros(0, np.uint32)
    freq = _read_frequencies(reader)
    lanes = _lanes(count)
    states = np.frombuffer(reader.take(4 * lanes), "<u4").astype(np.uint64)
    used, more = struct.unpack("<II", reader.take(8))
    words = np.frombuffer(reader.take(2 * used), "<u2").astype(np.uint64)
    plain = reader.take(more)
    if (states < LOW).any():
        raise Corrupt
    symbol = np.repeat(np.arange(ALPHABET), freq)
    within = np.arange(SCALE) - (np.cumsum(freq) - freq)[symbol]
    tokens = np.empty(count, np.int64)
    read = 0
    for base in range(0, count, lanes):
        x = states[: min(lanes, count - base)]
        slot = (x & np.uint64(SCALE - 1)).astype(np.int64)
        part = symbol[slot]
        tokens[base : base + lanes] = part
        x = freq[part].astype(np.uint64) * (x >> np.uint64(SCALE_BITS)) + within[slot].astype(np.uint64)
        low = np.flatnonzero(x < LOW)
        if read + len(low) > used:
            raise Corrupt
        x[low] = x[low] << np.uint64(16) | words[read : read + len(low)]
        states[: len(x)] = x
        read += len(low)
    if read != used or (states != LOW).any():
        raise Corrupt
    return _values_of(tokens, plain)


def _values_of(tokens: Array, plain: bytes) -> npt.NDArray[np.uint32]:
    values = tokens.copy()
    large = np.flatnonzero(tokens >= DIRECT)
    bucket = tokens[large] - DIRECT
    widths = bucket // 4 + 6
    if (int(widths.sum()) + 7) // 8 != len(plain):
        raise Corrupt
    values[large] = ((4 | bucket & 3) << widths) | _from_bits(plain, widths).astype(np.int64)
    return values.astype(np.uint32)


# ---- a body ----


class Reader:
    """Takes bytes off the front; raises Corrupt when there are too few."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self.data) - self.at:
            raise Corrupt
        self.at += size
        return self.data[self.at - size : self.at]


def encode(x: npt.NDArray[np.float32], bound: float, stages: int) -> bytes:
    """The body of ``x`` (rows, dim), at least one element."""
    rows, dim = x.shape
    flat = np.ascontiguousarray(x).reshape(-1)
    exact: Array = np.zeros(0, np.int64)
    if stages & LOSSLESS:
        codes = flat.view(np.int32)
    else:
        codes, exact = quantise(flat, bound)
    vectors, refs = codes.reshape(rows, dim), b""
    if stages & LZ:
        numbers, new = find_repeats(vectors)
        refs = entropy_code(numbers) if stages & RANS else pack(numbers.view(np.int32))
        vectors = vectors[new]
    listed = np.empty(len(exact), [("at", "<u4"), ("value", "<f4")])
    listed["at"], listed["value"] = exact, flat[exact]
    literals = vectors.reshape(-1)
    coded = entropy_code(zigzag(literals)) if stages & RANS else pack(literals)
    return struct.pack("<II", len(exact), len(vectors)) + listed.tobytes() + refs + coded


def decode(body: bytes, rows: int, dim: int, bound: float, stages: int) -> npt.NDArray[np.float32]:
    """The inverse of :func:`encode`; raises Corrupt."""
    reader = Reader(body)
    exact, distinct = struct.unpack("<II", reader.take(8))
    if exact > rows * dim or distinct > rows or (not stages & LZ and distinct != rows):
        raise Corrupt
    listed = np.frombuffer(reader.take(8 * exact), [("at", "<u4"), ("value", "<f4")])
    numbers = np.zeros(0, np.uint32)
    if stages & LZ:
        numbers = entropy_decode(reader, rows) if stages & RANS else unpack(reader, rows).view(np.uint32)
    count = distinct * dim
    codes = zagzig(entropy_decode(reader, count)) if stages & RANS else unpack(reader, count)
    if reader.at != len(body) or (listed["at"] >= rows * dim).any():
        raise Corrupt
    vectors = (codes.view(np.float32) if stages & LOSSLESS else restore(codes, bound)).reshape(distinct, dim)
    if stages & LZ:
        new = np.cumsum(numbers == 0)
        if new[-1] != distinct or (numbers > new).any():
            raise Corrupt
        vectors = vectors[np.where(numbers == 0, new, numbers).astype(np.int64) - 1]
    x = np.ascontiguousarray(vectors).reshape(-1)
    x = x if x.flags.writeable else x.copy()
    x[listed["at"]] = listed["value"]
    return x.reshape(rows, dim)
