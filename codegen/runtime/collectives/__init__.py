"""Collectives as point-to-point messages over ``torch.distributed``: the schedules that were priced, sent."""
