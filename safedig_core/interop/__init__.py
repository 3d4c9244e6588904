"""Other libraries' SAEs."""
