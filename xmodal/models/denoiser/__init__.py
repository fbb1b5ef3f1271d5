"""Image generation: the denoising transformer and flow matching."""
