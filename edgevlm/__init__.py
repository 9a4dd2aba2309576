"""EdgeVLM."""
