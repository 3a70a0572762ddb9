"""Scores of videos: feature networks, distances between sets of features, and what they mean."""
