"""Deduplicated input (RecD, MLSys 23): inverse-keyed jagged tensors and batches of whole sessions."""
