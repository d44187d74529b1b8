"""What runs reach: accuracy against samples and options, and which rules of patience fit."""
