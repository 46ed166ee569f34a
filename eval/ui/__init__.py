"""``pilotage ui``: a page in the browser."""
