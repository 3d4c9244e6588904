"""Operators, gate and plan."""
