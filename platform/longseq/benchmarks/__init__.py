"""Measurements of the product, side by side with what it claims: pure functions that return typed rows."""
