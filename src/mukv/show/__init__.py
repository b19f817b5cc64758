"""Output for people: progress, pages, figures, messages."""
