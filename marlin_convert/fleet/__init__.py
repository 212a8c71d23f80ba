"""Many checkpoints: a list of them, what has become of each, and processes or a cluster that convert them."""
