"""Other people's packages behind our ops: probed, never required."""
