"""Play a world: the session, its window, terminal and web page, and a Gymnasium environment."""
