"""Speed of decoding as ratios, side by side in one run."""
