"""The parts of scripts/vqkv.py: NumPy alone."""
