"""Where training samples come from: sources, methods of guided rounds, and their cost."""
