"""Accelerate launch configurations, as package data."""
