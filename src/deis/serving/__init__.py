"""A small reference server: an example to copy into a serving system, not a product."""
