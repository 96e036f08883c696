"""Other planners' objectives, stated as assignment problems so that the same solver can optimise them."""
