"""Pixel-wise tagging of cosmic-ray and neutrino charge in three-plane wire images, at full resolution."""
