"""Loaders for trained networks in the formats of other code bases; each returns a `deis.Denoiser`."""
