"""Where Pilotage stands between a pipeline and its denoiser and scheduler, for one call."""
