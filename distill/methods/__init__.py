"""The distillation methods, each written once against the denoiser interface; `distill.method` is their border."""
