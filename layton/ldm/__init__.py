"""The latent diffusion model: an ordinary ``StableDiffusionPipeline`` folder, small enough to be trained on a CPU."""
