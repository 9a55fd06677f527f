"""The lab: a page on one's own machine, to try samplers by looking."""
