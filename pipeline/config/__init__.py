"""The configuration: its model, its layers, its recipes and its listing."""
