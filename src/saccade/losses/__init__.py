"""Focal losses, and what only losses share."""
