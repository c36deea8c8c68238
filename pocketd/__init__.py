"""pocketd: a daemon that runs featherweight pockets inside warm service containers."""

__version__ = "0.1.0"
