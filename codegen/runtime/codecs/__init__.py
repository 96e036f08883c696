"""Codecs of embedding traffic: error-bounded and of fixed rate.

>>> import torch
>>> from codegen.runtime.codecs import decode, encode
>>> x = torch.tensor([[0.5, -0.25, 1.0]]).repeat(1000, 16)
>>> payload = encode(x, "eb_lz_entropy", 1e-3)
>>> len(payload) < x.nbytes / 100, bool(((decode(payload, 1000, 48) - x).abs() <= 1e-3).all())
(True, True)
"""

from codegen.runtime.codecs.frame import absolute_bound, decode, decode_at, encode

__all__ = ["absolute_bound", "decode", "decode_at", "encode"]
