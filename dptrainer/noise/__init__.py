"""Noise that only a receipt can draw: step keys, the ChaCha20 keystream, Gaussian values."""

from dptrainer.noise.exact import ExactNoise
from dptrainer.noise.keys import Purpose, step_key
from dptrainer.noise.source import NoiseSource, SecureNoise

__all__ = ["ExactNoise", "NoiseSource", "Purpose", "SecureNoise", "step_key"]
