"""Whole samplers, learners, runs and plans, each measured by a program of its own."""
