"""The heart wing: from a model's scores to beats, heart rate and rhythm."""
