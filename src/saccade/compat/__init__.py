"""The import surfaces of other projects, so that their users change one line."""
