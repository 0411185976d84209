"""What the reading verbs tell, as data: they print it as text or as JSON."""
