"""Models: what a network predicts, and the networks that `deis.load_model` finds."""
