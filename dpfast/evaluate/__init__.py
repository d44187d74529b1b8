"""Measures of a classifier on real images: a test set, its shifts, ImageNet-style sets."""
