"""Finds the smallest or fastest recipe that costs a model no more accuracy than allowed."""
