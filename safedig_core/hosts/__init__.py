"""Models that can be sampled with a tap attached."""
