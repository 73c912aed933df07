"""The tool around the stages: command line, configuration, runs that survive interruption, export."""

__version__ = "0.1.0"
