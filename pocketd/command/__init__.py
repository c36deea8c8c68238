"""The `pocket` command."""
