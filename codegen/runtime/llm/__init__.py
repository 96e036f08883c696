"""A decoder trained in tensor, context, pipeline and data parallelism on ``torch.distributed``, as a plan says."""
