"""Visual-anchored reflection data (VARD) from models that are served elsewhere."""
