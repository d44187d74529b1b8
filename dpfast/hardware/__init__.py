"""The parts of the machine that this process may use. The room knows no other in the package."""
