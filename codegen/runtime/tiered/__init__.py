"""Embedding tables whose rows live in several memory tiers.

:mod:`~codegen.runtime.tiered.pages` keeps rows in files of checksummed pages (memory-mapped, or a block file
read past the page cache), :mod:`~codegen.runtime.tiered.table` keeps hot rows and a cache of the others in
memory and fetches ahead of use, :mod:`~codegen.runtime.tiered.bag` is the trainable module, and
:mod:`~codegen.runtime.tiered.planned` builds one from a plan. Only ``bag`` and ``planned`` need torch.
"""
