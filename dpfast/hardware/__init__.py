"""What this process may use of the machine that it runs on. Knows nobody else in the package."""
