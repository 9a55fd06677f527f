"""Plans in the loops of other programs: diffusers, k-diffusion, ComfyUI."""
