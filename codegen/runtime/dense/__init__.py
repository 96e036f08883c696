"""The dense part over ranks: FSDP and HSDP by torch, 2D sparse parallelism from process groups."""
