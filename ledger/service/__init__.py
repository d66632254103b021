"""What runs as a program: the command line, and the jobs behind its commands."""

__all__: list[str] = []
