"""Single operations at fixed sizes: `dpfast bench ops`, `pool`, `loader` and `theory`."""
