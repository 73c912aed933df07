"""The plain-torch twins of the kernels: the definition of every op, and the truth in the tests."""
