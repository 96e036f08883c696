"""Quantizers of every number format, on any device.

>>> import torch
>>> from codegen.runtime.mx import fake_quantize, qsnr, quantize
>>> x = torch.tensor([[1.0, 0.3, -2.7, 0.05]])
>>> fake_quantize(x, "mxfp4_e2m1")
tensor([[ 1.0000,  0.2500, -3.0000,  0.0000]])
>>> quantize(x, "mx9").dequantize()
tensor([[ 1.0000,  0.2969, -2.6875,  0.0625]])

``fake_quantize`` is the simple door; ``quantize`` gives codes and scales, ``pack`` their storage layout,
``qsnr`` and ``qsnr_many`` what a format loses. Formats are named in :mod:`ir.formats`; what the formats'
specifications leave open is decided in ``docs/formats.md``.
"""

from codegen.runtime.mx_fake import fake_quantize
from codegen.runtime.mx_packing import Packed, pack, unpack
from codegen.runtime.mx_qsnr import qsnr, qsnr_many
from codegen.runtime.mx_tensor import Quantized, dequantize, quantize
from ir.formats import Format, parse_format

__all__ = [
    "Format",
    "Packed",
    "Quantized",
    "dequantize",
    "fake_quantize",
    "pack",
    "parse_format",
    "qsnr",
    "qsnr_many",
    "quantize",
    "unpack",
]
