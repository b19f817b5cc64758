"""What a person sees: progress, pages, figures, messages."""
