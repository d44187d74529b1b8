"""How cases are measured: in turns, after their tests, with records that name the machine."""
