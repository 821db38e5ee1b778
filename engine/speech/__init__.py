"""The speech wing: what becomes of the scores of a speech model: words, partials, finals."""
