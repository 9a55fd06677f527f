"""Matrix-valued linear SDEs: a coefficient is a k x k block of a phase space, or one number a frequency."""
