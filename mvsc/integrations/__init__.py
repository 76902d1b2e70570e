"""What a host needs beyond ``attach``: one file a host, imported by its own path."""
