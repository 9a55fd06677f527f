"""Plans in other people's loops: diffusers, k-diffusion, ComfyUI."""
